"""Where images come from: what `ImageDataModule` is told of its source, and the data sets found there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision

from fvar_lightning.data.datasets import FolderDataset, hold_out
from fvar_lightning.data.folders import scan_folder
from fvar_lightning.data.hf import HFDataset, HFOptions, HFRows, is_hf_folder, load_hf
from fvar_lightning.data.images import ImageTransform
from fvar_lightning.data.photographs import PHOTOGRAPHS, PhotographDataset
from fvar_lightning.data.streams import HFStream
from fvar_lightning.data.torchvision_sets import TorchvisionDataset, load_torchvision


class Source(NamedTuple):
    """What is found: data sets of (uint8 tensor (3, H, W), label)."""

    class_names: list[str]
    train: Any
    val: Any
    """Of length 0 if there is nothing to validate with."""


@dataclass(frozen=True)
class SourceOptions:
    """Arguments of `ImageDataModule` that tell of its source. See there.

    `transform` is that of training images.
    """

    source: str
    transform: ImageTransform
    root: str | None = None
    val_fraction: float = 0.1
    crops_per_photograph: int = 256
    max_unreadable: int | None = None
    download: bool = False
    seed: int = 0
    hf: HFOptions = HFOptions()  # noqa: RUF009  (frozen)

    @property
    def val_transform(self) -> ImageTransform:
        """The centre, as it is."""
        return replace(self.transform, random_crop=False, flip=False)

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of every `ImageDataset`."""
        return {"seed": self.seed, "max_unreadable": self.max_unreadable}


def find_source(options: SourceOptions) -> Source:
    """The data sets of a source.

    Raises:
        ValueError: if there is no such source, or it cannot be used.
    """
    source = options.source
    if source.startswith("hf:"):
        return hf_source(options)
    if options.root is not None:
        return torchvision_source(options)
    if source == "photographs":
        return photograph_source(options)
    if Path(source).expanduser().is_dir():
        return folder_source(options)
    hint = "; root must tell where it lies" if source in torchvision.datasets.__all__ else ""
    raise ValueError(
        "source must be 'photographs', an existing folder, 'hf:' and a data set of Hugging Face, or with root a "
        f"torchvision data set, got {source!r}{hint}"
    )


def folder_source(options: SourceOptions) -> Source:
    """Class folders, or images alone."""
    try:
        names, train, val = scan_folder(options.source, options.val_fraction)
    except ValueError as error:
        if is_hf_folder(options.source):
            raise ValueError(f"{error}; 'hf:{options.source}' reads it as a data set of Hugging Face") from None
        raise
    return Source(
        names,
        FolderDataset(train, names, options.transform, **options.common),
        FolderDataset(val, names, options.val_transform, **options.common),
    )


def photograph_source(options: SourceOptions) -> Source:
    """Crops of the photographs of scikit-image; those for validation are other crops of the same."""
    size, crops = options.transform.size, options.crops_per_photograph
    held_out: Any = ()
    if options.val_fraction > 0:
        count = max(1, round(options.val_fraction * crops))
        held_out = PhotographDataset(size, count, seed=options.seed, validation=True)
    train = PhotographDataset(size, crops, flip=options.transform.flip, seed=options.seed)
    return Source(list(PHOTOGRAPHS), train, held_out)


def torchvision_source(options: SourceOptions) -> Source:
    """A data set of torchvision, by name."""
    assert options.root is not None
    names, train, val = load_torchvision(options.source, options.root, options.val_fraction, options.download)
    return Source(
        names,
        TorchvisionDataset(train[0], names, options.transform, train[1], **options.common),
        TorchvisionDataset(val[0], names, options.val_transform, val[1], **options.common),
    )


def hf_source(options: SourceOptions) -> Source:
    """A data set of Hugging Face: a place on disk or a name on the hub, after ``hf:``."""
    names, train, val = load_hf(options.source.removeprefix("hf:"), options.hf)
    if options.hf.streaming:
        return _hf_stream(options, names, train, val)
    if val is None:
        chosen, held_out = hold_out(len(train.rows), options.val_fraction)
        val = train
    else:
        chosen, held_out = np.arange(len(train.rows)), np.arange(len(val.rows))
    return Source(
        names,
        HFDataset(train, names, options.transform, chosen, **options.common),
        HFDataset(val, names, options.val_transform, held_out, **options.common),
    )


def _hf_stream(options: SourceOptions, names: list[str], train: HFRows, val: HFRows | None) -> Source:
    if val is None and options.val_fraction > 0:
        raise ValueError(
            f"val_fraction {options.val_fraction} cannot be held out of a stream: name a split in hf.val_split, or "
            "give val_fraction 0 to go without validation"
        )
    samples = options.hf.samples_per_epoch or train.length
    if not samples:
        raise ValueError(f"hf.samples_per_epoch must be given, as {train.origin} does not tell its length")
    stream = HFStream(train, names, options.transform, samples, buffer=options.hf.buffer, **options.common)
    held_out: Any = ()
    if val is not None:
        held_out = HFDataset(val, names, options.val_transform, np.arange(len(val.rows)), **options.common)
    return Source(names, stream, held_out)
