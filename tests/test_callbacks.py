"""The evaluating callbacks against plain calls, SciPy, closed forms, and themselves on two processes."""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from evaluation_worker import (
    LAYOUT,
    SAMPLES,
    TinyExtractor,
    make_data,
    make_task,
    make_trainer,
    run,
    write_tokenizers,
)
from fvar_lightning.callbacks import (
    AliasMetrics,
    DeviceWeightAveraging,
    GenerationMetrics,
    LastCheckpoint,
    ReconstructionMetrics,
    SamplePictures,
    StudentEvaluation,
    TokenizerPictures,
    TokenWriter,
    log_picture,
    pictures,
)
from fvar_lightning.callbacks.reconstruction import local_lpips
from fvar_lightning.cli import main
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.data.sources import Source
from fvar_lightning.data.streams import HFStream
from fvar_lightning.data.token_dataset import TokenDataset
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.metrics.pictures import bar_chart, line_chart
from fvar_lightning.metrics.statistics import Statistics
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.weights.checkpoints import load_initial_weights, load_tokenizer
from fvar_lightning.weights.identity import file_sha256, weights_sha256

CONF = Path(__file__).parent / "conf"
WORKER = Path(__file__).parent / "evaluation_worker.py"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def metrics(root: Path, **options: Any) -> GenerationMetrics:
    defaults: dict[str, Any] = {"num_samples": SAMPLES, "extractor": TinyExtractor, "cache": str(root / "cache")}
    return GenerationMetrics(**(defaults | options))


def make_tokenizer_task() -> TokenizerTask:
    torch.manual_seed(0)
    return TokenizerTask(FocusSchedule(**LAYOUT), vocab_size=8, z_channels=4, ch=8, ch_mult=(1, 1, 2),
                         num_res_blocks=1)  # fmt: skip


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def real_features(images: Path) -> np.ndarray:
    dataset = make_data(images).real_images("train")
    pixels = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return TinyExtractor()(pixels).features.double().numpy()


# GenerationMetrics


def test_figures_are_those_of_plain_calls(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    """Labels balanced, one seed for each image, real images as validation crops them; SciPy's matrix root."""
    (values,) = make_trainer(tmp_path, [metrics(tmp_path, base_seed=5)]).validate(
        make_task(tokenizers), make_data(image_folder, flip=True), verbose=False
    )
    task = make_task(tokenizers)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    images = torch.cat([task.generate(labels[i : i + 1], seeds=[5 + i]) for i in range(SAMPLES)])
    generated = TinyExtractor()(to_uint8(images)).features.double().numpy()
    assert values["val/fd_tiny"] == pytest.approx(frechet(generated, real_features(image_folder)), rel=1e-4)
    assert {"val/kd_tiny", "val/is_tiny", "val/precision_tiny", "val/recall_tiny"} <= set(values)


@pytest.mark.parametrize("noise", [False, True])
def test_real_images_against_themselves_and_against_noise(
    noise: bool, tokenizers: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_data(image_folder).real_images("train")
    images = torch.stack([dataset[i][0] for i in range(len(dataset))]).float() / 127.5 - 1
    if noise:
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(FVARTask, "generate", lambda task, labels, seeds: images[torch.tensor(seeds)])
    callbacks = [metrics(tmp_path, num_samples=len(images)), AliasMetrics(num_samples=len(images))]
    (values,) = make_trainer(tmp_path, callbacks).validate(
        make_task(tokenizers), make_data(image_folder), verbose=False
    )
    if noise:
        assert values["val/fd_tiny"] > 0.1
        assert values["val/precision_tiny"] == values["val/recall_tiny"] == 0
        assert values["val/spectrum/distance"] > 6
    else:
        assert values["val/fd_tiny"] == pytest.approx(0, abs=1e-9)
        assert values["val/precision_tiny"] == values["val/recall_tiny"] == 1


def test_report_holds_what_makes_a_figure_traceable(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    task = make_task(tokenizers)
    task.trainer = trainer
    task.trainer = trainer
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    callback = metrics(tmp_path, sampling={"guidance": 2.0, "top_k": 4})
    with pytest.warns(UserWarning, match="7 generated images for 12 features"):
        (values,) = make_trainer(tmp_path, [callback]).test(
            make_task(tokenizers), make_data(image_folder), ckpt_path=tmp_path / "model.ckpt", verbose=False
        )
    report = json.loads((tmp_path / "logs" / "version_0" / "generation_tiny.json").read_text())
    assert report["values"]["fd_tiny"] == pytest.approx(values["test/fd_tiny"])
    assert any("7 generated images for 12 features" in warning for warning in report["warnings"])
    assert any("subsets of 7 images" in warning for warning in report["warnings"])
    settings = report["settings"]
    assert settings["samples"] == SAMPLES
    assert settings["sampling"] == {"guidance": 2.0, "top_k": 4, "top_p": 0.96}
    assert (settings["extractor"], settings["real_images"], settings["image_size"]) == ("tiny", 16, 16)
    assert report["checkpoint"] == {
        "path": str(tmp_path / "model.ckpt"),
        "sha256": file_sha256(tmp_path / "model.ckpt"),
    }
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["seconds"]["generation"] > 0


def test_protocol_from_the_command_line(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    """Short names, the offline extractor by its class path, and a configuration that comes after the model's."""
    extractor = {"class_path": "fvar_lightning.metrics.EfficientNetLite0"}
    options = {"num_samples": 2, "cache": str(tmp_path / "cache"), "extractor": extractor}
    callbacks = [{"class_path": "GenerationMetrics", "init_args": options}, {"class_path": "SamplePictures"}]
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
    args = [f"--model.{kind}_tokenizer={path}" for kind, path in zip(("structure", "alias"), tokenizers, strict=True)]
    args += [f"--data.source={image_folder}", f"--trainer.logger.save_dir={tmp_path}"]
    args += [f"--trainer.default_root_dir={tmp_path}", "--data.schedule.max_radius=0.75"]
    task, trainer = make_task(tokenizers), make_trainer(tmp_path, [], logger=False)
    task.trainer = trainer
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    args.append(f"--ckpt_path={tmp_path / 'model.ckpt'}")
    main(["test", f"--config={CONF / 'fvar.yaml'}", f"--config={tmp_path / 'protocol.yaml'}", *args])
    (path,) = tmp_path.rglob("generation_efficientnet_lite0.json")
    report = json.loads(path.read_text())
    assert report["values"]["fd_efficientnet_lite0"] > 0
    assert report["settings"]["features"] == 1280
    assert report["checkpoint"]["path"] == str(tmp_path / "model.ckpt")


def test_real_statistics_are_computed_once_and_again_when_the_images_change(
    tokenizers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "images"
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(source / name / f"{i}.png")
    passes: list[int] = []
    extract = TinyExtractor.extract
    monkeypatch.setattr(TinyExtractor, "extract", lambda self, x: passes.append(len(x)) or extract(self, x))

    def seen() -> int:
        """Images that passed the extractor in a run with a data module and callback of its own."""
        passes.clear()
        make_trainer(tmp_path, [metrics(tmp_path)]).validate(make_task(tokenizers), make_data(source), verbose=False)
        return sum(passes)

    assert seen() == SAMPLES + 8
    assert seen() == SAMPLES
    path = source / "a" / "0.png"
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    assert seen() == SAMPLES + 8
    assert len(list((tmp_path / "cache").glob("train-*-tiny-16.npz"))) == 2


def test_a_second_run_compares_with_its_own_images(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    callback = metrics(tmp_path)
    trainer, found = make_trainer(tmp_path, [callback]), []
    for fraction in (0.2, 0.5):
        data = make_data(image_folder, val_fraction=fraction)
        trainer.validate(make_task(tokenizers), data, verbose=False)
        found.append((callback.real_name, callback.real_statistics.count))
    assert [count for _, count in found] == [16, 10]
    assert found[0][0] != found[1][0]


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    trainer = make_trainer(tmp_path, [metrics(tmp_path)])
    with pytest.warns(UserWarning, match="statistics of the real images cannot be kept for the next run"):
        trainer.validate(make_task(tokenizers), make_data(image_folder), verbose=False)
    assert trainer.callback_metrics["val/fd_tiny"] > 0


def save_reference(path: Path, extractor: str, image_size: int) -> str:
    values = np.random.default_rng(0).normal(size=(20, 12))
    Statistics(extractor, torch.from_numpy(values.mean(0)), torch.from_numpy(np.cov(values.T)), 20, image_size).save(
        path
    )
    return str(path)


def test_references_of_another_kind_are_refused(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    other = save_reference(tmp_path / "other.npz", "inception", 16)
    larger = save_reference(tmp_path / "larger.npz", "tiny", 32)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK")
    for reference, message in (
        (other, "extractor 'inception', not 'tiny'"),
        (larger, "image_size 32, not 16"),
        (str(broken), "holds no feature statistics"),
        (str(tmp_path / "none.npz"), "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, [metrics(tmp_path, reference=reference)]).validate(
                make_task(tokenizers), make_data(image_folder)
            )


def test_adm_reference_batch_gives_all_figures(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    """Frechet distance from its mu and sigma, precision and recall from its images."""
    data = make_data(image_folder)
    # in the loader's order: the kernel distance draws subsets
    pixels = torch.cat([images for images, _ in data.eval_loader(data.real_images("train"))])
    features = real_features(image_folder)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy(), mu=features.mean(0), sigma=np.cov(features.T))
    named = {"extractor": lambda: TinyExtractor("inception")}
    results = [
        make_trainer(tmp_path, [metrics(tmp_path, **options, **named)]).validate(
            make_task(tokenizers), make_data(image_folder), verbose=False
        )[0]
        for options in ({"reference": str(path)}, {})
    ]
    figures = [{k: v for k, v in result.items() if k.endswith("_inception")} for result in results]
    assert {"val/fid_inception", "val/kid_inception", "val/precision_inception", "val/is_inception"} <= set(figures[0])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_training_goes_on_as_if_nothing_had_been_evaluated(
    tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """Same weights and same global random states; nothing of the extractor in the checkpoint."""
    states, random = [], []
    for i, callbacks in enumerate(([], [metrics(tmp_path), AliasMetrics(8), SamplePictures(2, 1)])):
        trainer = make_trainer(tmp_path, callbacks, max_epochs=2)
        task = make_task(tokenizers)
        trainer.fit(task, make_data(image_folder))
        random.append((torch.get_rng_state(), np.random.get_state()[1]))  # noqa: NPY002 - the global one is meant
        assert task.student.training
        path = tmp_path / f"{i}.ckpt"
        trainer.save_checkpoint(path)
        states.append(torch.load(path, weights_only=True))
    assert weights_sha256(states[0]["state_dict"]) == weights_sha256(states[1]["state_dict"])
    assert torch.equal(random[0][0], random[1][0])
    assert np.array_equal(random[0][1], random[1][1])
    assert states[1]["callbacks"] == {}
    assert states[0].keys() == states[1].keys()
    pictures = {p.name.rsplit("-", 1)[0] for p in (tmp_path / "logs" / "version_0" / "pictures").glob("*.png")}
    assert pictures == {"val_samples", "val_focus", "val_spectrum"}


class Watch(StudentEvaluation):
    """Notes the weights that images would be generated with."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, **options)
        self.seen: list[Tensor] = []

    def generate(self, trainer: Trainer, task: FVARTask) -> None:
        self.seen.append(task.student.head.weight.detach().clone())


@pytest.mark.parametrize("first", ["watch", "average"])
def test_averaged_weights_are_judged_whatever_the_order_of_callbacks(
    first: str, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    average, raw = Watch(), Watch(weights="raw")
    averaging = DeviceWeightAveraging(0.5)
    watches = [average, raw]
    callbacks = [*watches, averaging] if first == "watch" else [averaging, *watches]
    # written while training, when raw and averaged weights still differ
    callbacks.append(ModelCheckpoint(tmp_path, "last", every_n_train_steps=8))
    trainer = make_trainer(tmp_path, callbacks, max_steps=8, enable_checkpointing=True)
    trainer.fit(make_task(tokenizers), make_data(image_folder))
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    kept = {
        "ema": checkpoint["state_dict"]["student.head.weight"],
        "raw": checkpoint["current_model_state"]["student.head.weight"],
    }
    assert not torch.equal(kept["ema"], kept["raw"])
    assert torch.equal(average.seen[0], kept["ema"])
    assert torch.equal(raw.seen[0], kept["raw"])
    assert len(average.seen) == len(raw.seen) == 1
    for weights, expected in kept.items():
        watch = Watch(weights=weights)
        make_trainer(tmp_path, [watch]).validate(
            make_task(tokenizers), make_data(image_folder), ckpt_path=path, verbose=False
        )
        assert torch.equal(watch.seen[0], expected)


def test_before_the_average_begins_the_weights_are_those_of_training(
    tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """In validation, and after a fit that ends before; the copy that waits is of the untrained weights."""
    watch, average = Watch(), Watch()
    task = make_task(tokenizers)
    untrained = task.student.head.weight.detach().clone()
    make_trainer(tmp_path, [watch, DeviceWeightAveraging(0.5, 100)], max_steps=8).fit(task, make_data(image_folder))
    assert torch.equal(watch.seen[0], task.student.head.weight)
    assert not torch.equal(watch.seen[0], untrained)
    task = make_task(tokenizers)
    make_trainer(tmp_path, [average, DeviceWeightAveraging(0.5, 3)], max_steps=8).fit(task, make_data(image_folder))
    assert torch.equal(average.seen[0], task.student.head.weight)
    assert not torch.equal(average.seen[0], watch.seen[0])


@pytest.mark.parametrize("interval", [3, 100])
def test_the_end_of_training_is_in_the_last_checkpoint(
    interval: int, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """Also with averages, which replace the weights when training has ended."""
    averaging, last = DeviceWeightAveraging(0.5), LastCheckpoint(str(tmp_path), interval)
    trainer = make_trainer(tmp_path, [last, averaging], max_steps=11, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(make_task(tokenizers), make_data(image_folder))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 11
    plain = make_trainer(tmp_path / "plain", [], max_steps=11, max_epochs=-1)
    plain.fit(task := make_task(tokenizers), make_data(image_folder))
    raw = checkpoint["current_model_state"]
    for name, value in task.state_dict().items():
        assert torch.equal(raw[name], value), name
    assert not torch.equal(raw["student.head.weight"], checkpoint["state_dict"]["student.head.weight"])


def test_the_average_lies_where_the_strategy_brings_the_model(
    tokenizers: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the model is when the run is set up; also of a student that is built as late as that."""

    class Elsewhere(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("meta"))

    class Built(Exception):
        pass

    def stop(task: FVARTask, stage: str) -> None:
        task.to_empty(device="cpu")  # where the trainer takes it at the end
        raise Built

    monkeypatch.setattr(FVARTask, "setup", stop)
    averaging = DeviceWeightAveraging()
    task = FVARTask(*tokenizers, depth=2, width=32, heads=2)
    with pytest.raises(Built):
        make_trainer(tmp_path, [Elsewhere(), averaging]).fit(task, make_data(image_folder))
    average = averaging._average_model
    assert any(name.startswith("module.student.") for name, _ in average.named_parameters())
    assert {x.device.type for x in (*average.parameters(), *average.buffers())} == {"meta"}


def lightnings_averaging(decay: float) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=decay, use_buffers=False)


@pytest.mark.parametrize(
    ("before", "after"), [(lightnings_averaging, DeviceWeightAveraging), (DeviceWeightAveraging, lightnings_averaging)]
)
def test_averages_go_on_from_lightnings_own_and_back(
    before: Callable[[float], Callback],
    after: Callable[[float], Callback],
    tokenizers: list[str],
    image_folder: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Without averaging the step before once more, as among accumulated batches where the callback's state is lost."""

    def fit(name: str, averaging: Callback, ckpt_path: Path | None = None) -> list[Path]:
        steps = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=2, save_top_k=-1)
        options = {"max_steps": 4, "max_epochs": -1, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, [averaging, steps], **options)
        trainer.fit(make_task(tokenizers), make_data(image_folder), ckpt_path=ckpt_path)
        return [tmp_path / name / f"step={step}.ckpt" for step in (2, 4)]

    half, end = fit("whole", before(0.5))
    _, resumed_end = fit("resumed", after(0.5), half)
    assert not [w for w in recwarn if "callbacks used to create the checkpoint" in str(w.message)]
    whole, resumed = (torch.load(path, weights_only=True) for path in (end, resumed_end))
    for part in ("state_dict", "current_model_state", "averaging_state"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name


def test_frozen_tokenizers_are_not_averaged(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    """0.9999 x + 0.0001 x is not x, in float32."""
    averaging, last = DeviceWeightAveraging(0.9999), LastCheckpoint(str(tmp_path))
    trainer = make_trainer(tmp_path, [last, averaging], max_steps=4, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(make_task(tokenizers), make_data(image_folder))
    averaged = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in make_task(tokenizers).state_dict().items():
        if name.startswith(("vae.", "alias_tokenizer.")):
            assert torch.equal(averaged[name], value), name


def test_averages_of_a_tokenizer_begin_after_the_warm_up(image_folder: Path, tmp_path: Path) -> None:
    """The codes are averaged with the encoder that they follow, their statistics are not; before, there is nothing."""

    class Codes(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: TokenizerTask, *args: object) -> None:
            self.seen.append(pl_module.tokenizer.codebook.embedding.weight.clone())

    options = {"vocab_size": 8, "z_channels": 4, "ch": 8, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "warmup_steps": 2}
    for start in (3, 100):
        watch, last = Codes(), LastCheckpoint(str(tmp_path / str(start)))
        averaging = DeviceWeightAveraging(0.5, start)
        trainer = make_trainer(
            tmp_path, [watch, last, averaging], max_steps=6, max_epochs=-1, enable_checkpointing=True
        )
        trainer.fit(TokenizerTask(FocusSchedule(**LAYOUT), **options), make_data(image_folder, batch_size=4))
        checkpoint = torch.load(tmp_path / str(start) / "last.ckpt", weights_only=True)
        loaded = load_tokenizer(tmp_path / str(start) / "last.ckpt").state_dict()
        raw = {name.removeprefix("tokenizer."): x for name, x in checkpoint["current_model_state"].items()}
        codes = "quantizer.codebook.embedding.weight"
        if start == 100:
            assert all(torch.equal(loaded[name], raw[name]) for name in loaded)
        else:
            torch.testing.assert_close(loaded[codes], watch.seen[3] / 4 + watch.seen[4] / 4 + watch.seen[5] / 2)
            assert all(torch.equal(loaded[f"quantizer.codebook.{n}"], raw[f"quantizer.codebook.{n}"])
                       for n in ("updates", "counts", "sums", "idle"))  # fmt: skip


def test_every_n_epochs_goes_on_in_a_resumed_run(tokenizers: list[str], image_folder: Path, tmp_path: Path) -> None:
    watch = Watch(every_n_epochs=3)
    trainer = make_trainer(tmp_path, [watch], max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(make_task(tokenizers), make_data(image_folder))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert len(watch.seen) == 0
    trainer = make_trainer(tmp_path, [watch], max_epochs=5, num_sanity_val_steps=1)
    trainer.fit(make_task(tokenizers), make_data(image_folder), ckpt_path=tmp_path / "last.ckpt")
    assert len(watch.seen) == 1, "the third"


def test_a_run_without_data_does_not_end_without_figures(
    tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="GenerationMetrics had no batch to run at"):
        make_trainer(tmp_path, [metrics(tmp_path)]).test(
            make_task(tokenizers), make_data(image_folder, val_fraction=0.0)
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GenerationMetrics(1), "num_samples must be at least 2, got 1"),
        (lambda: GenerationMetrics(real="test"), "real must be one of .* got 'test'"),
        (lambda: GenerationMetrics(weights="swa"), "weights must be one of .* got 'swa'"),
        (lambda: GenerationMetrics(sampling={"cfg": 1}), "sampling may hold .* got cfg"),
        (
            lambda: GenerationMetrics(sampling={"guidance": "strong"}),
            "guidance must be a finite number .* got 'strong'",
        ),
        (lambda: SamplePictures(sampling={"guidance": [1.5, -1.0]}), r"guidance must be .* got \[1.5, -1.0\]"),
        (lambda: SamplePictures(sampling={"more_smooth": "yes"}), "more_smooth must be true or false, got 'yes'"),
        (lambda: AliasMetrics(8, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: SamplePictures(classes=0), "classes must be at least 1, got 0"),
        (lambda: TokenizerPictures(side=0), "side must be at least 1, got 0"),
        (lambda: ReconstructionMetrics(lpips="resnet"), "lpips must be one of .* got 'resnet'"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_callbacks_refuse_the_other_task(tokenizers: list[str]) -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for callback, task in (
        (GenerationMetrics(), make_tokenizer_task()),
        (TokenizerPictures(), make_task(tokenizers)),
        (ReconstructionMetrics(), make_task(tokenizers)),
        (ReconstructionMetrics(), AliasTokenizerTask(FocusSchedule(**LAYOUT))),
    ):
        with pytest.raises(ValueError, match=r"needs a (FVARTask|TokenizerTask)"):
            callback.setup(trainer, task, "fit")


@pytest.fixture(scope="module")
def cached_tokens(tokenizers: list[str], image_folder: Path) -> str:
    root = Path(tokenizers[0]).parent / "cached"
    data = make_data(image_folder, predict="tokens", part="val")
    make_trainer(root, [TokenWriter(str(root / "tokens"))]).predict(make_task(tokenizers), data)
    return str(root / "tokens")


def without_fingerprint(images: Path) -> ImageDataModule:
    """A data module of one's own."""
    data = make_data(images)
    data.find_source = lambda: Source(["blue", "red"], [(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)] * 4, [])
    return data


def streaming(images: Path) -> ImageDataModule:
    data = make_data(images)
    data.find_source = lambda: Source(["blue", "red"], object.__new__(HFStream), [])
    return data


def of_three_patches(images: Path) -> ImageDataModule:
    layout = LAYOUT | {"patch_nums": (1, 2, 3)}
    return ImageDataModule(str(images), image_size=12, schedule=FocusSchedule(**layout), batch_size=2, num_workers=0)


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (AliasMetrics, "tokens", "AliasMetrics compares with images, but the batches are TokenBatchs"),
        (AliasMetrics, of_three_patches, r"image_size must be 4 strides \(16\) or more whole ones, got 12"),
        (GenerationMetrics, "tokens", "real images come from an ImageDataModule, this run has TokenDataModule"),
        (GenerationMetrics, streaming, "real 'train' images of a stream cannot be counted out"),
        (GenerationMetrics, without_fingerprint, "dataset must be one of ImageDataModule, got list"),
        (
            lambda: GenerationMetrics(real="val"),
            lambda images: make_data(images, val_fraction=0.0),
            "real must name a part with images, 'val' has none",
        ),
    ],
)
def test_data_that_give_no_figures_are_refused_before_any_training(
    make: Callable[[], Callback],
    data: str | Callable[[Path], ImageDataModule],
    message: str,
    tokenizers: list[str],
    cached_tokens: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for late in ("training_step", "generate"):
        monkeypatch.setattr(FVARTask, late, lambda *args, late=late, **options: pytest.fail(f"{late} came first"))
    made = TokenDataModule(cached_tokens, cached_tokens, 2, 0) if data == "tokens" else data(image_folder)
    # without num_classes it takes the image size of the data
    task = FVARTask(*tokenizers, depth=2, width=32, heads=2)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [make()], num_sanity_val_steps=1).fit(task, made)


# two processes


def read_gaps(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_make_every_sample_once(
    strategy: str, tokenizers: list[str], image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Files equal to one process's, figures too: 7 images in batches of 2 are not shared evenly."""
    root = Path(tokenizers[0]).parent
    one, two = root / f"one_{strategy}", root / strategy
    run(one, image_folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), strategy, str(image_folder), str(two)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert reports[1]["settings"]["ranks"] == 2
    # the order in which features are gathered decides the subsets of the kernel distance and the score's parts
    names = ["fd_tiny", "precision_tiny", "recall_tiny"]
    assert [reports[1]["values"][n] for n in names] == pytest.approx([reports[0]["values"][n] for n in names], rel=1e-5)
    assert reports[1]["settings"]["real_images"] == 16
    gaps = [read_gaps(folder / "logs" / "version_0" / "teacher_gap.csv") for folder in (one, two)]
    assert len(gaps[0]) == 4
    # the control depends on how images are shared out
    for row, other in zip(*gaps, strict=True):
        for figure in ("student", "teacher", "teacher_gap", "teacher_gate"):
            assert float(other[figure]) == pytest.approx(float(row[figure]), rel=1e-3, abs=1e-4)
    files = [{p.relative_to(f): p.read_bytes() for p in (f / "samples").rglob("*.*") if p.suffix != ".json"}
             for f in (one, two)]  # fmt: skip
    assert len(files[0]) == 7
    assert files[0] == files[1]
    caches = [TokenDataset(folder / "tokens") for folder in (one, two)]
    assert [cache.cache.layout.ranks for cache in caches] == [1, 2]
    rows = [cache.collate([cache[i] for i in range(len(cache))]) for cache in caches]
    assert len(rows[0].labels) == 32
    assert torch.equal(rows[0].labels, rows[1].labels)
    # in the order of the images; batches of other images may round another way
    for part in ("structure", "alias"):
        same = [torch.cat(getattr(batch, part), 1) for batch in rows]
        assert (same[0] == same[1]).double().mean() > 0.99


# reconstructions


class Fading(TokenizerTask):
    """Reconstructs a known part of an image."""

    factor = 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, list[Tensor]]:
        return {"decoded": [self.factor * batch.images]}

    def reconstruct(self, batch: Any) -> list[Tensor]:
        """Every focus state k too bright by 0.1 k."""
        return [state + 0.1 * (k + 1) for k, state in enumerate(batch.blurred)]

    def on_validation_epoch_end(self) -> None:
        pass


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_reconstruction_figures_have_closed_forms(factor: float, image_folder: Path, tmp_path: Path) -> None:
    """Half of every amplitude is a quarter of the power, -6.02 dB in every band, and no other grid."""
    torch.manual_seed(0)
    task = Fading(FocusSchedule(**LAYOUT), vocab_size=8, z_channels=4, ch=8, ch_mult=(1, 1, 2), num_res_blocks=1)
    task.factor = factor
    callback = ReconstructionMetrics(TinyExtractor, lpips=None)
    (values,) = make_trainer(tmp_path, [callback]).validate(task, make_data(image_folder), verbose=False)
    level = 20 * np.log10(factor)
    assert values["val/high_band"] == pytest.approx(level, abs=1e-6)
    assert values["val/spectrum/distance"] == pytest.approx(-level, abs=1e-6)
    assert values["val/spectrum/tilt_high"] == pytest.approx(level, abs=1e-6)
    for k in range(1, task.schedule.focus_states + 1):
        assert values[f"val/focus_psnr/{k}"] == pytest.approx(20 * np.log10(2 / (0.1 * k)), abs=1e-3)
    assert values["val/grid/reconstructed"] == pytest.approx(values["val/grid/original"])
    if factor == 1:
        assert values["val/ssim"] == pytest.approx(1)
        assert values["val/fd_tiny"] == pytest.approx(0, abs=1e-6)
    else:
        assert values["val/ssim"] < 0.9
        dataset = make_data(image_folder).real_images("val")
        pixels = torch.stack([dataset[i][0] for i in range(len(dataset))])
        made = to_uint8(factor * (pixels.float() / 127.5 - 1))
        features = [TinyExtractor()(x).features.double().numpy() for x in (made, pixels)]
        assert values["val/fd_tiny"] == pytest.approx(frechet(*features), rel=1e-3)


def test_lpips_is_used_where_its_weights_are_and_says_so_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="LPIPS is off: the weights of squeeze are not at"):
        assert local_lpips("squeeze", 64) is None
    path = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    with pytest.warns(UserWarning, match="LPIPS is off: it needs images of 64 px or more, these have 16"):
        assert local_lpips("squeeze", 16) is None
    lpips = local_lpips("squeeze", 64)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert lpips(images, images) == 0
    assert lpips(images, -images) > 0


def test_tokenizer_pictures_and_reconstruct(image_folder: Path, tmp_path: Path) -> None:
    task = make_tokenizer_task()
    trainer = make_trainer(tmp_path, [TokenizerPictures(num_images=2, side=20)])
    trainer.validate(task, make_data(image_folder), verbose=False)
    folder = tmp_path / "logs" / "version_0" / "pictures"
    assert {p.name for p in folder.iterdir()} == {"val_reconstructions-0000000.png", "val_usage-0000000.png"}
    codebook = task.tokenizer.codebook  # the warm-up, in which there are no tokens, is over
    codebook.load_state_dict(codebook.state_dict() | {"updates": torch.tensor(2000)})
    data = make_data(image_folder)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    found = task.eval().reconstruct(batch)
    decoded = task.tokenizer.decode_stages(task.tokenizer.encode(batch.views.focused))
    assert len(found) == len(batch.blurred)
    for image, scale in zip(found, task.schedule.last_scales, strict=True):
        torch.testing.assert_close(image, decoded[scale])


# loggers and plots


def test_pictures_reach_every_kind_of_logger(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)

    csv = CSVLogger(tmp_path, name="csv", version=0)
    log_picture(csv, "val/a", picture, 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "csv/version_0/pictures/val_a-0000003.png")), pixels)

    board = TensorBoardLogger(tmp_path, name="board", version=0)
    log_picture(board, "val/a", picture, 3)
    board.experiment.flush()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    (event,) = events.Images("val/a")
    assert (event.step, event.height, event.width) == (3, 6, 5)

    calls: list[tuple[object, ...]] = []
    wandb = WandbLogger.__new__(WandbLogger)  # the package itself need not be installed
    wandb.log_image = lambda key, images, step: calls.append((key, images, step))
    log_picture(wandb, "val/a", picture, 3)
    assert calls == [("val/a", [picture], 3)]

    class Other(LightningModule):
        pass

    with pytest.warns(UserWarning, match="Other gets no pictures"):
        log_picture(Other(), "val/a", picture, 3)


def test_bars_are_as_high_as_their_values() -> None:
    chart = np.asarray(bar_chart({"low": 0.25, "high": 1.0}, "title"))
    blue = (chart == (31, 119, 180)).all(-1)
    half = chart.shape[1] // 2
    low, high = (blue[:, part].any(1).sum() for part in (slice(None, half), slice(half, None)))
    assert low / high == pytest.approx(0.25, abs=0.02)
    unseen = np.asarray(bar_chart({"unseen": float("nan")}, "title"))
    assert (unseen == (31, 119, 180)).all(-1).any(1).sum() <= 1, "the axis, no bar"
    with pytest.raises(ValueError, match="values must not be empty"):
        bar_chart({}, "title")


def test_curves_run_between_their_extremes() -> None:
    rising, flat = [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)], [(0.0, 2.0), (2.0, 2.0)]
    chart = np.asarray(line_chart({"left": {"a": rising}, "right": {"a": rising, "b": flat}}, "step"))
    blue = (chart == (31, 119, 180)).all(-1)
    middle = chart.shape[1] // 2
    for half in (blue[:, :middle], blue[:, middle:]):
        rows, columns = np.nonzero(half[len(half) // 2 : int(0.8 * len(half))])  # below the legend
        assert np.polyfit(columns, rows, 1)[0] < -0.3, "the curve rises from the lower left"
    orange = (np.abs(chart.astype(int) - (255, 127, 14)) < 40).all(-1)
    assert not orange[:, :middle].any()
    assert orange[:, middle:].any(0).sum() > 0.4 * middle, "a level curve across the right panel"
    with pytest.raises(ValueError, match="panels must not be empty"):
        line_chart({}, "step")


@pytest.mark.parametrize("start", [2, 100], ids=["averaged", "not-yet"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_averages_gives_every_run_the_weights_it_needs(
    start: int, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """Before the first average Lightning keeps the weights that training began with in their place."""
    averaging, last = (
        EMAWeightAveraging(decay=0.5, use_buffers=False, update_starting_at_step=start), LastCheckpoint(str(tmp_path))
    )  # fmt: skip
    trainer = make_trainer(tmp_path, [last, averaging], max_steps=4, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(make_task(tokenizers), make_data(image_folder))
    path, name = tmp_path / "last.ckpt", "student.head.weight"
    checkpoint = torch.load(path, weights_only=True)
    raw, averaged = checkpoint["current_model_state"][name], checkpoint["state_dict"][name]
    assert not torch.equal(raw, averaged)
    judged = averaged if start == 2 else raw

    task = make_task(tokenizers)
    make_trainer(tmp_path, []).validate(task, make_data(image_folder), ckpt_path=path, verbose=False)
    assert torch.equal(task.student.head.weight, judged)
    assert torch.equal(FVARTask.load_from_checkpoint(path).student.head.weight, judged)
    fresh = make_task(tokenizers).student
    load_initial_weights(fresh, path)
    assert torch.equal(fresh.head.weight, judged)

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: FVARTask) -> None:
            self.seen = pl_module.student.head.weight.clone()

    watch = Start()
    trainer = make_trainer(tmp_path, [watch], max_steps=5, max_epochs=-1)
    trainer.fit(make_task(tokenizers), make_data(image_folder), ckpt_path=path)
    assert torch.equal(watch.seen, raw)


def test_larger_images_are_generated_in_smaller_batches(
    tokenizers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1024 px have 9451 tokens, 13.9 times those of 256 px; how many come at once shows in no picture."""
    assert StudentEvaluation(8).at_once(cast(FVARTask, task_of_length(680))) == 32
    assert StudentEvaluation(8).at_once(cast(FVARTask, task_of_length(9451))) == 2
    assert StudentEvaluation(8, batch_size=5).at_once(cast(FVARTask, task_of_length(9451))) == 5
    found: list[dict[str, Image.Image]] = []
    monkeypatch.setattr(pictures, "log_pictures", lambda trainer, shown: found.append(shown))
    for batch_size in (None, 3):
        SamplePictures(2, 2, batch_size=batch_size).generate(make_trainer(tmp_path, []), make_task(tokenizers))
    for name in ("samples", "focus"):
        together, apart = (np.asarray(shown[name], dtype=int) for shown in found)
        assert np.abs(together - apart).max() <= 1
        assert together.std() > 1


def task_of_length(tokens: int) -> SimpleNamespace:
    return SimpleNamespace(student=SimpleNamespace(layout=SimpleNamespace(length=tokens)))
