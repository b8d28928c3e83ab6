"""Stage 2 follows its data module: tokenizers at another image size, classes in Python without the command line."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from evaluation_worker import LAYOUT, make_data, make_trainer, sgd, write_tokenizers
from fvar_lightning.callbacks.tokens import TokenWriter
from fvar_lightning.cli import main
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.frozen import MEASURED
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.weights.checkpoints import load_tokenizer

TRAINED = FocusSchedule(**LAYOUT)
LARGER = FocusSchedule((1, 2, 3, 5, 8), patch_size=4, focus_states=3)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def larger_data(source: Path, **options: object) -> ImageDataModule:
    return ImageDataModule(str(source), image_size=32, schedule=LARGER, num_workers=0, val_fraction=0.2, **options)


def images(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("targets", ["view", "full", "feature"])
def test_a_structure_tokenizer_is_the_one_that_is_built_at_the_other_schedule(tmp_path: Path, targets: str) -> None:
    """Three scales with a phi of their own, then five that share the three."""
    sizes = {"targets": targets, "vocab_size": 16, "z_channels": 4, "ch": 8, "ch_mult": [1, 1, 2], "num_res_blocks": 1}
    trained = VQVAE(TRAINED, **sizes)
    for phi in trained.quantizer.phi:
        torch.nn.init.normal_(phi.weight, std=0.1)
    trained.codebook.step()
    expected = VQVAE(LARGER, **sizes, num_phi=3).eval()
    expected.load_state_dict(trained.state_dict())
    description = {"kind": "structure", "schedule": LAYOUT, **sizes}
    weights = {f"tokenizer.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"tokenizer": description, "state_dict": weights}, tmp_path / "structure.ckpt")

    found = load_tokenizer(tmp_path / "structure.ckpt", schedule=LARGER)
    assert isinstance(found, VQVAE)
    assert (found.schedule, found.psf) == (LARGER, trained.psf)
    with torch.no_grad():
        inputs = expected.inputs(images(32))
        for ours, theirs in zip(found.encode(found.inputs(images(32))), expected.encode(inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_deviations_of_alias_residuals_are_those_numpy_finds(tokenizers: list[str]) -> None:
    found = load_tokenizer(tokenizers[1], schedule=LARGER)
    assert isinstance(found, AliasTokenizer)
    batches = [Refocus(LARGER)(images(32) * strength).alias for strength in (1.0, 0.5, 0.25)]
    found.measure(batches)
    for scale in range(LARGER.num_scales - 1):
        values = np.concatenate([batch[scale].numpy() for batch in batches]).astype(np.float64)
        assert found.std(scale).item() == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-5)
    assert found.std(LARGER.num_scales - 1) == 1, "the sharp scale has no residual"


def test_another_patch_size_is_refused(tokenizers: list[str]) -> None:
    for path in tokenizers:
        with pytest.raises(ValueError, match="patch_size of the schedule must be the tokenizer's 4, got 8"):
            load_tokenizer(path, schedule=FocusSchedule((1, 2, 4), patch_size=8, focus_states=2))


def test_fit_in_python_takes_schedule_and_classes_from_the_data_module(
    tokenizers: list[str], image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    task = FVARTask(*tokenizers, depth=2, width=32, heads=2, optimizer=sgd)
    data = larger_data(image_folder, batch_size=4)
    trainer = make_trainer(tmp_path, [], logger=False, max_steps=1)
    trainer.fit(task, data)
    assert (task.num_classes, task.class_names) == (2, ["blue", "red"])
    assert task.vae.schedule == task.alias_tokenizer.schedule == LARGER
    told = [r.getMessage() for r in caplog.records if "was trained for" in r.getMessage()]
    assert [message.split()[0] for message in told] == ["structure_tokenizer", "alias_tokenizer"]
    assert f"was trained for {TRAINED}; it serves {LARGER}" in told[0]

    # the residuals of its training images, cropped as for validation
    shown = data.real_images("train")
    assert len(shown) <= MEASURED
    pixels = torch.stack([shown[i][0] for i in range(len(shown))]).float() / 127.5 - 1
    residuals = Refocus(LARGER)(pixels).alias
    for scale in range(LARGER.num_scales - 1):
        expected = residuals[scale].double().square().mean().sqrt().item()
        assert task.alias_tokenizer.std(scale).item() == pytest.approx(expected, rel=1e-4)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = FVARTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.class_names == ["blue", "red"]
    assert loaded.vae.schedule == LARGER
    assert torch.equal(loaded.alias_tokenizer.variance, task.alias_tokenizer.variance)
    assert loaded.generate(torch.tensor([1]), seeds=[0]).shape == (1, 3, 32, 32)


def test_a_checkpoint_is_not_measured_again(
    tokenizers: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = FVARTask(*tokenizers, depth=2, width=32, heads=2, optimizer=sgd)
    trainer = make_trainer(tmp_path, [], logger=False, max_steps=1)
    trainer.fit(task, larger_data(image_folder, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr(AliasTokenizer, "measure", lambda *_: pytest.fail("measured again"))
    loaded = FVARTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    make_trainer(tmp_path, [], logger=False).validate(loaded, larger_data(image_folder, batch_size=4), verbose=False)


def test_a_token_cache_tells_what_was_measured(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    """So that a checkpoint of a run from the cache encodes images as they were encoded into it."""
    data = larger_data(image_folder, batch_size=4, predict="tokens")
    writing = FVARTask(*tokenizers, depth=2, width=32, heads=2, optimizer=sgd)
    make_trainer(tmp_path, [TokenWriter(str(tmp_path / "tokens"))], logger=False).predict(writing, data)
    training = FVARTask(*tokenizers, depth=2, width=32, heads=2, optimizer=sgd)
    cached = TokenDataModule(str(tmp_path / "tokens"), batch_size=4, num_workers=0)
    make_trainer(tmp_path, [], logger=False, max_steps=1).fit(training, cached)
    assert training.vae.schedule == LARGER
    assert training.alias_tokenizer.deviations == pytest.approx(writing.alias_tokenizer.deviations, rel=1e-6)


def test_the_same_image_size_at_another_schedule_is_refused(tokenizers: list[str], image_folder: Path) -> None:
    """There a tokenizer of its own can be trained, and was most likely forgotten."""
    schedule = FocusSchedule((1, 2, 4), patch_size=4, focus_states=3)
    data = ImageDataModule(str(image_folder), image_size=16, schedule=schedule, num_workers=0)
    with pytest.raises(ValueError, match="schedule of the data module and of the tokenizer differ"):
        make_trainer(image_folder, [], logger=False).fit(FVARTask(*tokenizers, depth=2, width=32, heads=2), data)


def test_other_classes_than_the_data_modules_are_refused(tokenizers: list[str], image_folder: Path) -> None:
    task = FVARTask(*tokenizers, num_classes=5, depth=2, width=32, heads=2, optimizer=sgd)
    with pytest.raises(ValueError, match="num_classes must be the data module's 2, got 5"):
        make_trainer(image_folder, [], logger=False).fit(task, make_data(image_folder))


def test_fsdp1_which_clips_every_shard_by_its_own_norm_is_refused(tokenizers: list[str]) -> None:
    task = FVARTask(*tokenizers, num_classes=2, depth=2, width=32, heads=2)
    task.trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"must be ModelParallelStrategy .*fsdp2_bf16.yaml, got FSDPStrategy"):
        task.setup("fit")


def test_classes_that_nobody_tells_are_missed(tokenizers: list[str], tmp_path: Path) -> None:
    task = FVARTask(*tokenizers, depth=2, width=32, heads=2)
    message = "num_classes must be given where no data module tells the classes, got None"
    with pytest.raises(ValueError, match=message):
        task.configure_model()
    with pytest.raises(ValueError, match=message):
        Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path).fit(task, LightningDataModule())


def test_samples_of_a_checkpoint_need_no_images(tokenizers: list[str], tmp_path: Path) -> None:
    """Neither its tokenizers' files: the folder that the data module names does not exist."""
    task = FVARTask(*tokenizers, num_classes=2, class_names=["blue", "red"], depth=2, width=32, heads=2)
    trainer = make_trainer(tmp_path, [], logger=False)
    task.trainer = trainer
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    conf = Path(__file__).parent / "conf" / "fvar.yaml"
    main(["predict", f"--config={conf}", "--data.source=/nowhere", f"--data.schedule.max_radius={LAYOUT['max_radius']}",
          f"--ckpt_path={tmp_path / 'last.ckpt'}", "--data.samples_per_class=1", "--trainer.logger=false",
          "--trainer.callbacks=SampleWriter", f"--trainer.callbacks.folder={tmp_path / 'samples'}",
          f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert sorted(path.parent.name for path in (tmp_path / "samples").rglob("*.png")) == ["0000_blue", "0001_red"]
