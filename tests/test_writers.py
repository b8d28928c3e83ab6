"""`fvar predict`: which images are asked for, what is in the folder, and what an interrupted run makes of it."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_worker import make_data, make_task, make_trainer, write_tokenizers
from fvar_lightning.callbacks.samples import Sample, SampleFolder
from fvar_lightning.callbacks.writers import SampleWriter
from fvar_lightning.cli import main
from fvar_lightning.data.loaders import SampleRequests
from fvar_lightning.metrics.statistics import adm_images
from fvar_lightning.tasks.fvar import FVARTask


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def predict(tokenizers: list[str], images: Path, root: Path, *, steps: float = 1.0, **options: object) -> object:
    data = {"batch_size": 3} | {
        key: options.pop(key) for key in ("samples_per_class", "base_seed", "batch_size") if key in options
    }
    writer = SampleWriter(str(root / "samples"), **options)
    trainer = make_trainer(root, [writer], logger=False, limit_predict_batches=steps)
    return trainer.predict(make_task(tokenizers), make_data(images, **data))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tokenizers: list[str], image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert predict(tokenizers, image_folder, root, output="both") is None, "predictions are not collected"
    return root / "samples"


def test_requests_leave_out_what_is_finished() -> None:
    def asked(*args: object, **options: object) -> list[tuple[int, int]]:
        requests = SampleRequests(*args, **options)
        return [(int(label), int(seed)) for label, seed in (requests[i] for i in range(len(requests)))]

    everything = [(0, 10), (0, 11), (0, 12), (1, 13), (1, 14), (1, 15)]
    assert asked(2, 3, 10) == everything
    assert asked(2, 3, 10, finished=[10, 14, 99]) == [(0, 11), (0, 12), (1, 13), (1, 15)]
    assert asked(2, 3, 10, finished=[10, 14, 99], together=2) == everything
    assert asked(2, 3, 10, finished=[10, 11, 12, 15], together=2) == everything[2:]
    assert asked(2, 3, 10, finished=[10, 11, 12, 15], together=4) == everything
    assert asked(2, 2, 0, finished=range(4), together=3) == []


def test_ranks_resume_the_batches_of_an_undisturbed_run(image_folder: Path) -> None:
    """11 images a class on three ranks, in batches of 3: the 22 are 9, 9 and 4 in a step of all ranks."""

    def batches(finished: list[int]) -> list[list[list[int]]]:
        shares = []
        for rank in range(3):
            data = make_data(image_folder, batch_size=3, samples_per_class=11)
            strategy = SimpleNamespace(root_device=torch.device("cpu"))
            data.trainer = SimpleNamespace(
                world_size=3, global_rank=rank, num_devices=3, lightning_module=None, strategy=strategy
            )
            data.finished_seeds = lambda: finished
            shares.append([batch.seeds.tolist() for batch in data.predict_dataloader()])
        return shares

    whole = batches([])
    assert [len(share) for share in whole] == [3, 3, 3]
    assert batches([*range(9), 10, 20]) == [share[1:] for share in whole]
    assert batches([*range(18), 20]) == [share[2:] for share in whole]
    assert batches([*range(17), *range(18, 22)]) == [share[1:2] for share in whole]


def test_every_image_is_the_students_own(whole: Path, tokenizers: list[str]) -> None:
    task = make_task(tokenizers)
    for label, name in enumerate(("0000_blue", "0001_red")):
        for seed in range(4 * label, 4 * label + 4):
            image = task.generate(torch.tensor([label]), seeds=[seed])[0]
            expected = (image.numpy().transpose(1, 2, 0) + 1) * 127.5
            stored = np.asarray(Image.open(whole / name / f"{seed:06d}.png"))
            # the nearest level; made in a batch, the value itself differs by float32 rounding
            assert np.abs(stored - expected).max() <= 0.5 + 1e-3
    assert len(list(whole.rglob("*.png"))) == 8


def test_the_note_tells_how_the_images_were_made(whole: Path) -> None:
    note = json.loads((whole / "samples.json").read_text())
    assert note["settings"]["sampling"] == {"guidance": 1.5, "top_k": 900, "top_p": 0.96}
    assert note["settings"]["class_names"] == ["blue", "red"]
    assert note["settings"]["samples_per_class"] == 4
    assert len(note["settings"]["checkpoint_sha256"]) == 64
    assert {"torch", "lightning", "fvar-lightning"} <= set(note["versions"])


def test_npz_holds_the_pictures_with_their_labels_in_mixed_order(whole: Path) -> None:
    packed = adm_images(whole / "samples.npz")
    assert packed.shape == (8, 16, 16, 3)
    assert packed.dtype == np.uint8
    labels = np.load(whole / "samples.npz")["arr_1"]
    pictures = {np.asarray(Image.open(p)).tobytes(): int(p.parent.name[:4]) for p in whole.rglob("*.png")}
    assert len(pictures) == 8
    assert [pictures[image.tobytes()] for image in packed] == labels.tolist()
    assert {image.tobytes() for image in packed} == set(pictures)
    assert labels.tolist() != sorted(labels.tolist()), "consecutive parts must hold all classes"


@pytest.mark.parametrize(("killed_after", "again"), [(1, range(8)), (5, range(3, 8))])
def test_an_interrupted_run_goes_on_to_the_same_files(
    killed_after: int,
    again: range,
    whole: Path,
    tokenizers: list[str],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Sample] = []
    write = SampleFolder.write

    def failing(folder: SampleFolder, image: torch.Tensor, sample: Sample) -> None:
        if len(written) == killed_after:
            raise OSError("disk gone")
        write(folder, image, sample)
        written.append(sample)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", failing)
        with pytest.raises(OSError, match="disk gone"):
            predict(tokenizers, image_folder, tmp_path, output="both")
    # a file that a crash of the machine left torn, and two that were being written
    torn = SampleFolder(tmp_path / "samples", ["blue", "red"]).path(written[-1])
    torn.write_bytes(torn.read_bytes()[:-5])
    torn.with_name("000099.png.1.partial").write_bytes(b"half")
    (tmp_path / "samples" / "samples.npz.1.partial").write_bytes(b"half")

    made: list[int] = []
    generate = FVARTask.generate

    def counting(task: FVARTask, labels: torch.Tensor, **options: object) -> torch.Tensor:
        made.extend(options["seeds"].tolist())
        return generate(task, labels, **options)

    monkeypatch.setattr(FVARTask, "generate", counting)
    predict(tokenizers, image_folder, tmp_path, output="both")
    assert made == list(again), "the batches of which an image is missing, and no others"
    assert contents(tmp_path / "samples") == contents(whole)

    made.clear()
    predict(tokenizers, image_folder, tmp_path, output="both")
    assert made == []


@pytest.mark.parametrize("output", ["both", pytest.param("npz", marks=pytest.mark.slow)])
def test_a_killed_process_started_again_gives_the_files_of_an_undisturbed_one(
    output: str, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL, which no process can prepare for, while pictures are being written."""
    count = 400

    def arguments(command: str) -> list[str]:
        return [
            command, f"--config={Path(__file__).parent / 'conf' / 'fvar.yaml'}", f"--data.source={image_folder}",
            *(f"--model.{k}_tokenizer={p}" for k, p in zip(("structure", "alias"), tokenizers, strict=True)),
            "--data.schedule.max_radius=0.75", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}",
        ]  # fmt: skip

    def samples(folder: str) -> list[str]:
        writer = {"folder": str(tmp_path / folder), "output": output}
        return [
            *arguments("predict"), f"--ckpt_path={tmp_path / 'last.ckpt'}", f"--data.samples_per_class={count // 2}",
            "--trainer.callbacks=SampleWriter", *(f"--trainer.callbacks.{k}={v}" for k, v in writer.items()),
        ]  # fmt: skip

    cli = main([*arguments("fit"), "--trainer.max_steps=1", "--model.optimizer=SGD", "--model.optimizer.lr=0.5"])
    cli.trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    main(samples("undisturbed"))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "fvar_lightning", *samples("killed")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while len(list(killed.glob("*/*.png"))) < count // 8:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(list(killed.glob("*/*.png"))) < count
    assert not (killed / "samples.npz").exists()
    main(samples("killed"))
    assert contents(killed) == contents(tmp_path / "undisturbed")
    assert len(contents(killed)) == (2 if output == "npz" else count + 2)


def test_npz_alone_leaves_no_pictures(
    whole: Path, tokenizers: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(tokenizers, image_folder, tmp_path, output="npz", steps=1)
    assert sorted(contents(tmp_path / "samples")) == [f"0000_blue/{i:06d}.png" for i in range(3)] + ["samples.json"]
    predict(tokenizers, image_folder, tmp_path, output="npz")
    found = contents(tmp_path / "samples")
    assert sorted(found) == ["samples.json", "samples.npz"]
    assert found == {name: data for name, data in contents(whole).items() if not name.endswith("png")}
    monkeypatch.setattr(FVARTask, "generate", None)
    predict(tokenizers, image_folder, tmp_path, output="npz")


@pytest.mark.parametrize("output", ["png", "both"])
def test_pictures_asked_for_later_are_unpacked(
    output: str, whole: Path, tokenizers: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a run that goes on where another was interrupted while it unpacked."""
    predict(tokenizers, image_folder, tmp_path, output="npz")
    assert not list(tmp_path.rglob("*.png"))
    monkeypatch.setattr(FVARTask, "generate", None)
    save, written = SampleFolder._save, []

    def failing(folder: SampleFolder, pixels: np.ndarray, sample: Sample) -> None:
        if len(written) == 3:
            raise OSError("disk gone")
        save(folder, pixels, sample)
        written.append(sample)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "_save", failing)
        with pytest.raises(OSError, match="disk gone"):
            predict(tokenizers, image_folder, tmp_path, output=output)
    assert len(list(tmp_path.rglob("*.png"))) == 3
    predict(tokenizers, image_folder, tmp_path, output=output)
    assert contents(tmp_path / "samples") == contents(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": {"guidance": 3.0}}, "sampling.guidance 1.5 instead of 3.0"),
        ({"samples_per_class": 5}, "samples_per_class 4 instead of 5"),
        ({"base_seed": 8}, "base_seed 0 instead of 8"),
        ({"weights": "raw"}, "weights 'ema' instead of 'raw'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    change: dict[str, object], message: str, whole: Path, tokenizers: list[str], image_folder: Path
) -> None:
    before = contents(whole)
    with pytest.raises(ValueError, match=message):
        predict(tokenizers, image_folder, whole.parent, **change)
    assert contents(whole) == before


def test_a_folder_of_another_checkpoint_is_refused(whole: Path, tokenizers: list[str], image_folder: Path) -> None:
    task = make_task(tokenizers)
    task.student.head.bias.data += 1
    writer = SampleWriter(str(whole))
    with pytest.raises(ValueError, match="checkpoint_sha256"):
        make_trainer(whole.parent, [writer], logger=False).predict(task, make_data(image_folder, batch_size=3))


def test_a_folder_without_images_is_anybodys(tmp_path: Path) -> None:
    """Of a run that was refused at its first image, say."""
    folder = SampleFolder(tmp_path, ["blue"])
    for strength in (-1.0, 3.0):
        folder.claim({"guidance": strength}, {})
    folder.write(torch.zeros(3, 4, 4), Sample(0, 0))
    with pytest.raises(ValueError, match=r"guidance 3.0 instead of 4.0"):
        folder.claim({"guidance": 4.0}, {})


def test_a_task_keeps_its_own_sampling(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    task, writer = make_task(tokenizers), SampleWriter(str(tmp_path / "samples"), sampling={"top_k": 1})
    before = dict(task.sampling)
    make_trainer(tmp_path, [writer], logger=False).predict(task, make_data(image_folder, batch_size=3))
    settings = json.loads((tmp_path / "samples" / "samples.json").read_text())["settings"]
    assert settings["sampling"] == before | {"top_k": 1}
    assert task.sampling == before


def test_pictures_of_unknown_origin_are_refused(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples" / "0000_blue" / "000000.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds images, but no samples.json"):
        predict(tokenizers, image_folder, tmp_path)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_averaged_or_raw_weights_of_a_checkpoint(
    weights: str, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """In the form that weight averaging gives a checkpoint."""
    task = make_task(tokenizers)
    trainer = make_trainer(tmp_path, [], logger=False)
    task.trainer = trainer
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    checkpoint["current_model_state"] = dict(checkpoint["state_dict"])
    name = "student.head.weight"
    checkpoint["current_model_state"][name] = checkpoint["state_dict"][name].flip(0)
    torch.save(checkpoint, tmp_path / "averaged.ckpt")
    trainer = make_trainer(tmp_path, [SampleWriter(str(tmp_path / "samples"), weights=weights)], logger=False)
    trainer.predict(
        make_task(tokenizers), make_data(image_folder, samples_per_class=1), ckpt_path=tmp_path / "averaged.ckpt"
    )
    if weights == "raw":
        task.student.head.weight.data = task.student.head.weight.data.flip(0)
    expected = task.generate(torch.tensor([1]), seeds=[1])[0].numpy().transpose(1, 2, 0)
    stored = np.asarray(Image.open(tmp_path / "samples" / "0001_red" / "000001.png"))
    assert np.array_equal(stored, ((expected + 1) * 127.5).round())
    note = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert note["settings"]["weights"] == weights
    assert note["checkpoint"] == str(tmp_path / "averaged.ckpt")
    assert (
        note["settings"]["checkpoint_sha256"] == hashlib.sha256((tmp_path / "averaged.ckpt").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "jpg"}, "output must be one of .* got 'jpg'"),
        ({"weights": "swa"}, "weights must be one of .* got 'swa'"),
        ({"sampling": {"cfg": 1}}, "sampling may hold guidance, .* got cfg"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleWriter("samples", **arguments)


def test_class_names_make_safe_folders(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, ["../up", "tench, Tinca tinca"])
    assert folder.path(Sample(0, 1)) == tmp_path / "0000_.._up" / "000001.png"
    assert folder.path(Sample(1, 2)) == tmp_path / "0001_tench_Tinca_tinca" / "000002.png"
