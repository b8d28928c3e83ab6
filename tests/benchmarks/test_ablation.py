"""The ablation study at a size of seconds: it runs, goes on and takes further arms, whose students are then sampled."""

import json
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.benchmark
def test_ablation_runs_and_goes_on_and_its_models_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is there is made again, and a new arm joins the others."""
    monkeypatch.syspath_prepend(str(STUDIES))
    import ablation

    command = ["photographs", "--tiny", "--output", str(tmp_path), "--seeds", "0", "--equal-time", "--guidance", "3"]
    ablation.main([*command, "--arms", "fvar"])
    folder = tmp_path / "photographs"
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".ckpt", ".npz")}
    table = ablation.main([*command, "--arms", "fvar", "self_distilled"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    rows = ("| `var` |", "| `fvar` |", "| `self_distilled` |")
    for title in ("## Equal steps\n", "## Equal time", "## Equal steps, guidance 3.0", *rows, "## Mean gate"):
        assert title in table
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"report.md", "figures.csv", "inputs.json", "steps.png", "time.png", "samples-0.png"} <= written
    runs = json.loads((folder / "inputs.json").read_text())["run_by"]
    assert [run["arms"] for run in runs] == [["var", "fvar"], ["var", "fvar", "self_distilled"]]
    ablation.main([*command, "--arms", "fvar"])
    assert ablation.main([*command, "--arms", "fvar", "self_distilled", "detached", "--report"]) == table
    assert json.loads((folder / "inputs.json").read_text())["run_by"] == runs, "nothing was run"
    with pytest.raises(SystemExit):
        ablation.main(["scenes128", "--tiny"])

    import sampling

    checkpoint = folder / "arms" / "fvar" / "0" / "steps" / "fvar" / "last.ckpt"
    command = ["photographs", "--model", str(checkpoint), "--output", str(tmp_path / "sampling"), "--count", "8"]
    rows = sampling.main(command).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        "default", "bf16", *(f"guidance stops after {n} of 6 scales" for n in (5, 4, 3, 2)), "no guidance",
    ]  # fmt: skip
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "sampling").iterdir()}
    assert sampling.main(command).splitlines()[2:] == rows
    assert {path: path.stat().st_mtime_ns for path in found} == found
    with pytest.raises(SystemExit):
        sampling.main([*command, "--guidance", "3"])
