"""The ablation study at a size of seconds: that it runs, goes on, and takes further arms."""

from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.benchmark
def test_ablation_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is there is made again, and a new arm joins the others."""
    monkeypatch.syspath_prepend(str(STUDIES))
    import ablation

    command = ["photographs", "--tiny", "--output", str(tmp_path), "--seeds", "0", "--equal-time"]
    ablation.main([*command, "--arms", "fvar"])
    folder = tmp_path / "photographs"
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".ckpt", ".npz")}
    table = ablation.main([*command, "--arms", "fvar", "self_distilled"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for title in ("## Equal steps", "## Equal time", "| var |", "| fvar |", "| self_distilled |", "## Mean gate"):
        assert title in table
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"report.md", "figures.csv", "inputs.json", "steps.png", "time.png", "samples-0.png"} <= written
    with pytest.raises(SystemExit):
        ablation.main(["scenes128", "--tiny"])
