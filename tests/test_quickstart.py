"""`fvar quickstart`: any number of images, and going on in the same folder."""

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import capture_parser
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from PIL import Image

from fvar_lightning.__main__ import run
from fvar_lightning.callbacks.remaining import RemainingTime
from fvar_lightning.quickstart import keep_to_source, quickstart, quickstart_command, restart_if_other, train
from fvar_lightning.report import loss_curves, loss_panels, tokenizer_panels, what_it_says, what_next
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


CURVES = {
    "structure": {"train/loss": [(9, 2.0)], "val/psnr": [(9, 14.0), (19, 18.34)], "val/usage/all": [(19, 0.82)]},
    "alias": {"val/snr/1x1": [(19, 3.0)], "val/snr/2x2": [(19, 3.02)], "val/usage/all": [(19, 0.61)]},
    "fvar": {
        "train/student": [(9, 5.5)],
        "train/feature": [(9, 1e-3)],
        "train/logit": [(9, 1e-4)],
        "val/student": [(9, 5.0), (19, 4.5)],
        "val/teacher": [(19, 4.46)],
        "val/feature": [(19, 1e-3)],
    },
}


def test_distillation_has_an_axis_of_its_own() -> None:
    panels = loss_panels(CURVES)
    assert set(panels["teacher and student"]) == {"train/student", "val/student"}
    assert set(panels["distillation"]) == {"train/feature", "train/logit", "val/feature"}
    without = {**CURVES, "fvar": {"train/student": [(9, 5.5)]}}
    assert "distillation" not in loss_panels(without)


def test_usage_and_signal_to_noise_are_drawn_of_both_tokenizers() -> None:
    panels = tokenizer_panels(CURVES)
    assert panels["alias tokenizer: codes in use"] == {"all": [(19, 0.61)]}
    assert set(panels["alias tokenizer: signal-to-noise ratio, dB"]) == {"1x1", "2x2"}
    assert panels["structure tokenizer: PSNR, dB"] == {"all": CURVES["structure"]["val/psnr"]}


def test_the_report_tells_the_figures_of_the_run() -> None:
    said = "\n".join(what_it_says(CURVES, 512))
    # 3.01 dB are half the power; ln 512 = 6.24; exp(4.5) = 90
    for figure in ("18.3 dB", "82%", "61%", "50% of the residual's power", "4.50 nats", "6.24", "among 90 codes",
                   "+0.040 nats"):  # fmt: skip
        assert figure in said
    assert "by heart" not in said
    rising = {**CURVES, "fvar": {"val/student": [(9, 4.2), (19, 4.5)]}}
    assert "lower at step 9 (4.20) than at step 19" in "\n".join(what_it_says(rising, 512))
    # a run too short for codes
    nothing = {"structure": {"val/usage/all": [(1, float("nan"))]}, "alias": {}, "fvar": {}}
    assert what_it_says(nothing, 512) == []


def test_the_report_names_commands_that_are_there() -> None:
    said = "\n".join(what_next(Path("my run"), "tabby cat", ["fvar", "quickstart", "--effort", "4"]))
    assert "--model 'my run/fvar/last.ckpt' --classes 'tabby cat'" in said
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith("fvar ")]
    assert {line[1] for line in lines} == {"generate", "edit", "quickstart", "export"}
    for line in lines:
        known = {name for action in capture_parser(run, [line[1]])._actions for name in action.option_strings}
        assert {word for word in line if word.startswith("--")} <= known


def test_remaining_time_goes_by_the_measured_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take three times what is expected of them triple what is left; a resumed stage counts its own."""
    now, logged = [0.0], {}
    monkeypatch.setattr("fvar_lightning.callbacks.remaining.perf_counter", lambda: now[0])
    task = SimpleNamespace(log=lambda name, value, **_: logged.update({name: value}))
    trainer = SimpleNamespace(global_step=50, max_steps=100)
    clock = RemainingTime({"first": 600.0, "between": 60.0, "last": 300.0})
    assert clock.begin("first") == "about 16 min left"
    clock.on_train_start(trainer, task)
    trainer.global_step, now[0] = 51, 18.0  # too early to tell
    clock.on_train_batch_end(trainer, task)
    assert logged["minutes_left"] == pytest.approx((600 * 0.49 + 360) / 60)
    trainer.global_step, now[0] = 60, 180.0
    clock.on_train_batch_end(trainer, task)
    assert logged["minutes_left"] == pytest.approx(3 * (600 * 0.4 + 360) / 60)
    trainer.global_step, now[0] = 100, 900.0
    clock.on_train_end(trainer, task)
    assert clock.begin("between") == "about 18 min left"
    assert clock.begin("last") == "about 15 min left"


@pytest.mark.slow
def test_three_thousand_images_with_256_files(tmp_path: Path) -> None:
    with file_limit(256):
        quickstart(write_images(tmp_path, 3000), str(tmp_path / "run"), effort=0.01)
    report = (tmp_path / "run" / "report.md").read_text().split("## fvar")[1]
    for name in ("student", "teacher", "feature", "logit", "loss"):
        assert f"val/{name}" in report
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == {
        "pyramid", "reconstructions", "samples", "losses", "tokenizers"
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


def test_a_folder_keeps_to_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizers of other images would count as done."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    keep_to_source(run, "b")  # and nothing was trained, as it held no images
    keep_to_source(run, "a")
    (run / "structure").mkdir()
    (run / "structure" / "last.ckpt").touch()
    keep_to_source(run, str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"output .*run' holds a run on '.*/a', not on '.*/b'"):
        quickstart("b", str(run))
    with pytest.raises(SystemExit) as refused:
        quickstart_command(["--output", str(run)])
    assert refused.value.code == 2
    assert "not on 'photographs'" in capsys.readouterr().err
    assert json.loads((run / "source.json").read_text()) == {"source": str(tmp_path / "a")}


def test_images_of_which_none_can_be_held_out_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, message in (
        (write_images(tmp_path, 1), "must hold two images of some class"),
        (str(tmp_path / "no"), "no images"),
    ):
        Path(source).mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as refused:
            quickstart_command(["--source", source, "--output", str(tmp_path / "run")])
        assert refused.value.code == 2
        assert message in capsys.readouterr().err


def test_a_stage_of_other_tokens_is_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the times of the files are: copies need not keep them."""
    stage, index = tmp_path / "fvar", tmp_path / "index.json"
    index.write_text("tokens")
    restart_if_other(stage, index)
    (stage / "last.ckpt").touch()
    os.utime(stage / "last.ckpt", (0, 0))
    restart_if_other(stage, index)
    assert (stage / "last.ckpt").is_file()
    for _ in range(2):
        index.write_text(index.read_text() + " of others")
        restart_if_other(stage, index)
        assert [path.name for path in stage.iterdir()] == ["tokens.json"]
    assert (tmp_path / "fvar-1" / "last.ckpt").is_file()
    assert capsys.readouterr().out.count("begin anew, the former ones are in") == 2


def test_the_quickstart_leaves_apples_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would choose it, and it has no float64."""
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cli = train("alias", tmp_path / "run", 0.001, [f"--data.source={write_images(tmp_path, 12)}"])
    assert isinstance(cli.trainer.accelerator, CPUAccelerator)
