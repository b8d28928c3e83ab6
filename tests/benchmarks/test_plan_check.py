"""The study that compares plans with steps that run: that it still does, and that they agree."""

from pathlib import Path

import pytest
from size import TINY

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.benchmark
def test_plans_are_compared_with_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import plan_check

    if TINY:
        name = "alias tokenizer, 64 px"
        monkeypatch.setattr(plan_check, "CASES", {name: plan_check.CASES[name]})
    plan_check.main()
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(plan_check.CASES)
    for _, *cells in rows:
        values = [float(cell.split()[0]) for cell in cells]
        for planned, found in zip(values[::2], values[1::2], strict=True):
            assert planned == pytest.approx(found, rel=0.03)
