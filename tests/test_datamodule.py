"""ImageDataModule: what its batches hold, and what it refuses."""

import pickle
import re
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from fvar_lightning.cli import main
from fvar_lightning.data.batches import ImageBatch, SampleBatch
from fvar_lightning.data.datasets import FolderDataset
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule

SCHEDULE = FocusSchedule((1, 2, 4), patch_size=4, focus_states=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ten images, and one broken image more."""
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "bee" / "broken.png").write_bytes(b"?")
    return tmp_path


def module(source: object, **options) -> ImageDataModule:
    options = {"image_size": 16, "schedule": SCHEDULE, "batch_size": 4, "num_workers": 0, "val_fraction": 0.2} | options
    return ImageDataModule(str(source), **options)


def on_rank(data, rank: int, ranks: int):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        world_size=ranks, global_rank=rank, num_devices=1, lightning_module=None, strategy=strategy
    )
    return data


@pytest.mark.filterwarnings("ignore:unreadable")
def test_batches_hold_images_and_what_the_optics_make_of_them(folder: Path) -> None:
    data = module(folder)
    assert data.num_classes == 3
    assert data.class_names == ["ant", "bee", "cow"]
    raw = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(raw, 0)
    assert isinstance(batch, ImageBatch)
    pixels, labels = raw
    np.testing.assert_allclose(batch.images.numpy(), pixels.numpy() / 255.0 * 2 - 1, atol=1e-6)
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.labels, labels)
    refocus = Refocus(SCHEDULE, "disk")
    expected = refocus(batch.images)
    for ours, theirs in zip(batch.views, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [tuple(state.shape) for state in batch.blurred] == [(4, 3, 16, 16)] * 3
    assert torch.equal(batch.blurred[-1], batch.images)


@pytest.mark.filterwarnings("ignore:unreadable")
def test_views_are_float32_without_gradients_under_autocast(folder: Path) -> None:
    data = module(folder)
    raw = next(iter(data.train_dataloader()))
    plain = data.on_after_batch_transfer(raw, 0)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        batch = data.on_after_batch_transfer(raw, 0)
    for tensor, same in zip(batch.views.focused + batch.blurred, plain.views.focused + plain.blurred, strict=True):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert torch.equal(tensor, same)


@pytest.mark.filterwarnings("ignore:unreadable")
def test_validation_sees_every_image_once_over_three_ranks_in_equally_many_batches(folder: Path) -> None:
    loaders = [on_rank(module(folder, batch_size=2, val_fraction=0.35), rank, 3).val_dataloader() for rank in range(3)]
    batches = [list(loader) for loader in loaders]
    assert len({len(share) for share in batches}) == 1
    pixels = torch.cat([images for share in batches for images, _ in share])
    everything = module(folder, val_fraction=0.35)
    whole = torch.cat([images for images, _ in everything.val_dataloader()])
    assert len(pixels) == len(whole) == 4 + 4 + 4
    assert sorted(map(hash, map(bytes, pixels.numpy()))) == sorted(map(hash, map(bytes, whole.numpy())))


def test_a_task_of_slurm_has_its_cores_to_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)

    def workers() -> int:
        data = module(folder, num_workers=None)
        data.trainer = SimpleNamespace(num_devices=8, strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
        return data._options(None)["num_workers"]

    assert workers() == 0, "twelve cores for eight GPUs"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert workers() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert workers() == 3


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_leaves_the_gpu_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    data = module(folder, num_workers=None)
    assert data._options(None)["pin_memory"]
    data.trainer = SimpleNamespace(num_devices=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    options = data._options(None)
    assert not options["pin_memory"]
    assert options["num_workers"] == 2, "the cores are needed for training"


def test_validation_mixes_classes_in_the_same_order_every_time(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
        for i in range(40):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / name / f"{i:02}.png")
    labels = [labels.tolist() for _, labels in module(tmp_path, val_fraction=0.5, batch_size=12).val_dataloader()]
    assert all(len(set(batch)) == 3 for batch in labels), labels
    again = module(tmp_path, val_fraction=0.5, batch_size=12, seed=7)
    assert [labels.tolist() for _, labels in again.val_dataloader()] == labels


@pytest.mark.filterwarnings("ignore:unreadable")
def test_training_ranks_get_equally_many_different_images(folder: Path) -> None:
    loaders = [on_rank(module(folder), rank, 3).train_dataloader() for rank in range(3)]
    indices = [[draw.index for draw in loader.sampler] for loader in loaders]
    assert [len(share) for share in indices] == [8, 8, 8]
    assert len(set().union(*indices)) == 24
    assert [len(loader) for loader in loaders] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:unreadable")
def test_incomplete_last_batch_is_dropped_unless_it_is_all_there_is(folder: Path) -> None:
    assert [len(images) for images, _ in module(folder, batch_size=7).train_dataloader()] == [7, 7, 7]
    assert [len(images) for images, _ in module(folder, batch_size=100).train_dataloader()] == [25]


def test_requests_for_samples(folder: Path) -> None:
    data = module(folder, samples_per_class=3, base_seed=100)
    batches = list(data.predict_dataloader())
    assert all(isinstance(batch, SampleBatch) for batch in batches)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.cat([batch.seeds for batch in batches]).tolist() == list(range(100, 109))
    assert data.on_after_batch_transfer(batches[0], 0) is batches[0]
    shares = [on_rank(module(folder, samples_per_class=3), rank, 2).predict_dataloader() for rank in range(2)]
    seeds = [[seed for batch in share for seed in batch.seeds.tolist()] for share in shares]
    assert seeds == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def test_images_in_order_for_token_caches(folder: Path) -> None:
    (folder / "bee" / "broken.png").unlink()

    def asked(data: ImageDataModule) -> tuple[Tensor, Tensor]:
        images, labels = (torch.cat(part) for part in zip(*data.predict_dataloader(), strict=True))
        return images, labels

    data = module(folder, predict="tokens", crops_per_image=2)
    images, labels = asked(data)
    assert labels.tolist() == ([0] * 8 + [1] * 8 + [2] * 8) * 2
    assert not torch.equal(images[:24], images[24:]), "every pass takes other crops"
    data.finished_rows = lambda rows, batch_size: {(48, 4): 28}[rows, batch_size]
    rest = asked(data)
    assert torch.equal(rest[0], images[28:])
    assert torch.equal(rest[1], labels[28:])
    data.finished_rows = lambda rows, batch_size: rows
    assert data.predict_dataloader() == []

    data = module(folder, predict="tokens", part="val", crops_per_image=2)
    images, labels = asked(data)
    assert labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    validated = torch.cat([batch[0] for batch in data.val_dataloader()])
    assert sorted(map(hash, map(bytes, images.numpy()))) == sorted(map(hash, map(bytes, validated.numpy())))
    assert data.cached_images()["crops_per_image"] == 1
    with pytest.raises(ValueError, match="part 'val' holds no images, see val_fraction"):
        module(folder, predict="tokens", part="val", val_fraction=0).predict_dataloader()
    with pytest.raises(ValueError, match="crops_per_image must be 1 without random_crop and flip, got 2"):
        module(folder, predict="tokens", crops_per_image=2, random_crop=False, flip=False).predict_dataloader()


def test_torchvision_source(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 8), ("t10k", 4)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + bytes(count * 784)
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    data = module("FashionMNIST", root=str(tmp_path))
    assert data.num_classes == 10
    assert data.class_names[9] == "Ankle boot"
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 4


def test_photographs_are_the_default() -> None:
    pytest.importorskip("skimage")
    data = ImageDataModule(image_size=16, schedule=SCHEDULE, crops_per_photograph=2, batch_size=8, num_workers=0)
    assert data.num_classes == len(data.class_names) >= 8
    assert [len(part) for part in (data._data.train, data._data.val)] == [2 * data.num_classes, data.num_classes]
    assert ImageDataModule(image_size=16, schedule=SCHEDULE, val_fraction=0.0).val_dataloader() == []


def test_refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size .* patch_nums .* patch_size: 4 \* 4 = 16, got 32"):
        module(folder, image_size=32)
    with pytest.raises(ValueError, match="predict must be 'samples' or 'tokens', got 'images'"):
        module(folder, predict="images")
    with pytest.raises(ValueError, match="part must be 'train' or 'val', got 'test'"):
        module(folder, part="test")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        module(folder, batch_size=0)
    with pytest.raises(ValueError, match="resize"):
        module(folder, resize="stretch")
    with pytest.raises(ValueError, match="val_fraction"):
        module(folder, val_fraction=1.5)
    with pytest.raises(ValueError, match="'no/such/folder'"):
        _ = module("no/such/folder").num_classes
    with pytest.raises(ValueError, match="root must tell where it lies"):
        _ = module("CIFAR10").num_classes
    with pytest.raises(ValueError, match=r"every rank needs one|cannot be shared"):
        on_rank(module(folder), 0, 100).val_dataloader()
    with pytest.raises(ValueError, match="cannot be shared by 100 ranks"):
        on_rank(module(folder), 0, 100).train_dataloader()


def test_options_parse_as_on_the_command_line(folder: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    config = parser.parse_args(
        [
            f"--data.source={folder}",
            "--data.image_size=32",
            "--data.resize=adm",
            "--data.schedule.patch_nums=[1,2,4]",
            "--data.schedule.patch_size=8",
            "--data.schedule.focus_states=2",
        ]
    )
    data = parser.instantiate(config).data
    assert data.schedule == FocusSchedule((1, 2, 4), 8, 2)
    assert data.num_classes == 3


class Watcher(LightningModule):
    """Keeps what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.batches: list = []

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.layer(batch.images.mean((2, 3))).sum()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        assert isinstance(batch, ImageBatch)

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> Tensor:
        return batch.seeds

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(**options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, max_epochs=1, **quiet, **options)


def test_whole_run_reports_unreadable_images_and_leaves_a_plain_checkpoint(folder: Path, tmp_path: Path) -> None:
    data = module(folder, num_workers=1)
    watcher = Watcher()
    run = trainer(precision="bf16-mixed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(watcher, datamodule=data)
    reports = [str(w.message) for w in caught if "unreadable training images" in str(w.message)]
    assert len(reports) == 1
    assert "1 of 25 images" in reports[0]
    assert "broken.png" in reports[0]
    assert all(isinstance(batch, ImageBatch) and batch.images.dtype == torch.float32 for batch in watcher.batches)
    run.save_checkpoint(tmp_path / "run.ckpt")
    torch.load(tmp_path / "run.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_prediction_and_overfitting_through_the_trainer(folder: Path) -> None:
    data = module(folder, samples_per_class=2)
    seeds = trainer().predict(Watcher(), datamodule=data)
    assert torch.cat(seeds).tolist() == list(range(6))
    watcher = Watcher()
    trainer(overfit_batches=2).fit(watcher, datamodule=data)
    assert [tuple(batch.images.shape) for batch in watcher.batches] == [(4, 3, 16, 16)] * 2


def test_without_validation_images_there_is_no_loader(folder: Path) -> None:
    assert module(folder, val_fraction=0).val_dataloader() == []


def test_module_survives_pickling_for_spawned_processes(folder: Path) -> None:
    data = module(folder)
    assert data.num_classes == 3
    assert pickle.loads(pickle.dumps(data.class_names)) == data.class_names
    assert isinstance(pickle.loads(pickle.dumps(data._data.train)), FolderDataset)


# ---- the documentation ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unreadable")
def test_a_source_of_ones_own_as_documented(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    classes = code.split("\n\n\nclass", 1)[1]
    assert len([line for line in classes.splitlines() if line.strip()]) < 30
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "listed.py").write_text(code)
    lines = [f"{path}\t{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")

    monkeypatch.syspath_prepend(tmp_path / "code")
    config = Path(__file__).parent / "conf" / "structure.yaml"
    cli = main(["fit", f"--config={config}", "--data=listed.ListedImages", f"--data.source={tmp_path / 'list.txt'}",
                "--data.image_size=16", "--data.schedule.patch_nums=[1,2,4]", "--data.schedule.patch_size=4",
                "--data.batch_size=4", "--data.num_workers=0", "--trainer.max_steps=1", "--trainer.logger=false",
                f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    data = cli.datamodule
    assert type(data).__name__ == "ListedImages"
    assert data.class_names == ["ant", "bee", "cow"]
    labels = [label for part in (data._data.train, data._data.val) for _, label in (part[i] for i in range(len(part)))]
    assert len(labels) == 31
    assert data._data.train.num_unreadable + data._data.val.num_unreadable == 1
