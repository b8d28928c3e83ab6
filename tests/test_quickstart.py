"""`fvar quickstart`: any number of images, and going on in the same folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvar_lightning.quickstart import loss_curves, quickstart
from fvar_lightning.tasks.fvar import FVARTask
from test_token_cache import file_limit


def write_images(root: Path, count: int) -> str:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((24, 24)).save(path)
    return str(root / "images")


def test_losses_of_validation_are_drawn_beside_those_of_training() -> None:
    points = [(0, 1.0)]
    found = {"train/loss": points, "val/loss": points, "val/usage/all": points, "train/vq": points}
    assert set(loss_curves(found)) == {"train/loss", "val/loss", "train/vq"}


@pytest.mark.slow
def test_three_thousand_images_with_256_files(tmp_path: Path) -> None:
    with file_limit(256):
        quickstart(write_images(tmp_path, 3000), str(tmp_path / "run"), effort=0.01)
    report = (tmp_path / "run" / "report.md").read_text().split("## fvar")[1]
    for name in ("student", "teacher", "feature", "logit", "loss"):
        assert f"val/{name}" in report
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == {
        "pyramid", "reconstructions", "samples", "losses"
    }  # fmt: skip


@pytest.mark.slow
def test_a_second_run_encodes_nothing_and_a_longer_one_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizers that were trained further make other tokens, on which stage 2 must begin anew."""
    source, encoded = write_images(tmp_path, 30), []
    predict_step = FVARTask.predict_step
    monkeypatch.setattr(
        FVARTask,
        "predict_step",
        lambda task, batch, i: (encoded.append(len(batch.labels)), predict_step(task, batch, i))[1],
    )
    for effort, rows, anew in ((0.005, 56, False), (0.005, 0, False), (0.01, 56, True)):
        encoded.clear()
        quickstart(source, str(tmp_path / "run"), effort=effort)
        assert sum(encoded) == rows
        assert ("begin anew" in capsys.readouterr().out) == anew
