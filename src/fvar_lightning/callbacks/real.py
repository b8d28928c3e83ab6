"""Statistics of the real images: computed once over all ranks, kept on disk, or read from a reference batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from fvar_lightning.callbacks.base import progress
from fvar_lightning.data.fingerprint import check_kind, fingerprint
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.metrics.extractors import FeatureExtractor
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics, adm_images, statistics_file

Part = Literal["train", "val"]
KEPT_FEATURES = 50_000


def real_images(trainer: Trainer, part: Part) -> Any:
    """A part of the data module's images, each once, cropped as for validation.

    Raises:
        ValueError: without an `ImageDataModule`, without images, for the training part of a stream, or for a data set
            that has no fingerprint.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ImageDataModule):
        raise ValueError(
            f"real images come from an ImageDataModule, this run has {type(data).__name__}: "
            "give `reference`, a file of statistics"
        )
    images = data.real_images(part)
    if not len(images):
        raise ValueError(f"real must name a part with images, {part!r} has none")
    check_kind(images)
    return images


def real_statistics(
    trainer: Trainer, extractor: FeatureExtractor, device: torch.device, part: Part, cache: Path
) -> tuple[Statistics | None, str]:
    """Statistics of a part of the data module's images (on rank 0 alone, on the CPU), and the name of the data.

    All ranks must call it. Features are kept of every n-th batch, so that there are about `KEPT_FEATURES` at most.

    Raises:
        ValueError: see `real_images`; or if the file in the cache is broken.
    """
    data, images = trainer.datamodule, real_images(trainer, part)  # type: ignore[attr-defined]
    size = data.schedule.image_size
    # one rank alone reads the folder, and decides
    name = fingerprint(images) if trainer.is_global_zero else ""
    path = trainer.strategy.broadcast(statistics_file(cache, f"{part}-{name}", extractor.name, size))
    if trainer.strategy.broadcast(path.is_file()):
        return (Statistics.load(path) if trainer.is_global_zero else None), path.stem
    computed = compute(trainer, extractor, device, data.eval_loader(images), size)
    if not trainer.is_global_zero:
        return None, path.stem
    try:
        computed.save(path)
    except OSError as error:
        rank_zero_warn(f"the statistics of the real images cannot be kept for the next run in {path}: {error}")
    return on(computed, "cpu"), path.stem


def compute(
    trainer: Trainer, extractor: FeatureExtractor, device: torch.device, loader: DataLoader, image_size: int
) -> Statistics:
    """Statistics over all ranks of a loader of uint8 images."""
    metric = FeatureStatistics(extractor.name, extractor.num_features, image_size).to(device)
    batches = len(loader)
    every = -(-batches * (loader.batch_size or 1) * trainer.world_size // KEPT_FEATURES)
    for i, (pixels, _) in enumerate(progress(trainer, loader, "Real images")):
        metric.keep_features = i % every == 0
        metric.update(*extractor(pixels.to(device)))
    return metric.compute()


def load_reference(path: str | Path, extractor: FeatureExtractor, image_size: int) -> Statistics:
    """Statistics from a file that `Statistics.save` wrote, or a reference batch of the ADM suite, on the CPU.

    Raises:
        ValueError: if the file is neither, or of another extractor or resolution.
    """
    if not Path(path).is_file():
        raise ValueError(f"reference {str(path)!r} does not exist")
    statistics = Statistics.load(path)
    for name, theirs, ours in (
        ("extractor", statistics.extractor, extractor.name),
        ("image_size", statistics.image_size, image_size),
    ):
        if theirs not in (None, ours):
            raise ValueError(f"reference {str(path)!r} holds statistics with {name} {theirs!r}, not {ours!r}")
    return statistics


def with_features(
    statistics: Statistics, path: str | Path, extractor: FeatureExtractor, device: torch.device
) -> Statistics:
    """A reference batch of the ADM suite keeps no features: take them of its images, for KID, precision and recall."""
    if statistics.features is not None or statistics.count is not None:
        return statistics
    pixels = torch.from_numpy(adm_images(path)).permute(0, 3, 1, 2)
    features = [extractor(batch.to(device)).features.cpu() for batch in pixels.split(64)]
    return replace(statistics, features=torch.cat(features))


def on(statistics: Statistics, device: torch.device | str) -> Statistics:
    """The statistics on a device."""
    tensors = {
        name: value.to(device)
        for name in ("mean", "covariance", "features", "logits")
        if isinstance(value := getattr(statistics, name), Tensor)
    }
    return replace(statistics, **tensors)  # type: ignore[arg-type]
