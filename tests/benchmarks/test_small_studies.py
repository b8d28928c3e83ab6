"""The studies of tokenizers and of editing at a size of seconds: they run, and go on where they were stopped."""

from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


def written(folder: Path) -> dict[Path, int]:
    """Every file, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.benchmark
def test_targets_and_editing(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import editing
    import targets

    monkeypatch.setattr(targets, "GENERATED", 8)
    command = ["scenes128", "--images", str(image_folder), "--output", str(tmp_path), "--effort", "0.001",
               "--seeds", "0", "--variants", "view", "alias"]  # fmt: skip
    table = targets.main(command)
    for title in ("PSNR, dB", "usage 8x8", "SNR, dB, 6x6", "generated: Frechet distance, efficientnet_lite0"):
        assert f"| {title} |" in table
    found = written(tmp_path)
    assert targets.main(command) == table
    assert written(tmp_path) == found

    (checkpoint,) = tmp_path.glob("scenes128/view/0/fvar/last.ckpt")
    command = ["--checkpoint", str(checkpoint), "--images", str(image_folder), "--output", str(tmp_path / "editing")]
    table = editing.main([*command, "--limit", "2"])
    for mask in editing.MASKS:
        assert f"| {mask} | requantise, feather 64 |" in table
    found = written(tmp_path / "editing")
    assert editing.main([*command, "--limit", "2"]) == table
    assert written(tmp_path / "editing") == found
    with pytest.raises(SystemExit):
        editing.main([*command, "--limit", "1"])
