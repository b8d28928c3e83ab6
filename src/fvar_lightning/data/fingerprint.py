"""fingerprint(): a name for the images of a data set that changes when they do, to cache what is computed of them."""

import hashlib
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from torchvision.datasets import DatasetFolder

from fvar_lightning.data.datasets import FolderDataset, ImageDataset
from fvar_lightning.data.hf import HFDataset
from fvar_lightning.data.photographs import PhotographDataset
from fvar_lightning.data.torchvision_sets import TorchvisionDataset


def fingerprint(dataset: ImageDataset | PhotographDataset) -> str:
    """16 hexadecimal digits.

    Of a folder they depend on path (below the folder), size and time of change of every file, not on the folder's own
    place; of a data set of Hugging Face on name, size and time of change of its files, on split, rows and labels; of a
    torchvision data set, whose contents are fixed, on its name, part and labels, and of one that reads any folder
    (`ImageFolder`) on the files too; of all on the crop.

    Raises:
        ValueError: see `check_kind`.
    """
    check_kind(dataset)
    digest = hashlib.sha256()
    for piece in _pieces(dataset):
        digest.update(piece)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def check_kind(dataset: Any) -> None:
    """Refuse what has no fingerprint.

    Raises:
        ValueError: for a data set that is none of those of `ImageDataModule`.
    """
    if not isinstance(dataset, PhotographDataset | FolderDataset | HFDataset | TorchvisionDataset):
        raise ValueError(f"dataset must be one of ImageDataModule, got {type(dataset).__name__}")


def _pieces(dataset: Any) -> Iterator[bytes]:
    if isinstance(dataset, PhotographDataset):
        settings = [dataset.size, dataset.crops_per_photograph, dataset.flip, dataset.seed, dataset.validation]
        yield f"photographs {settings} scikit-image {version('scikit-image')}".encode()
        return
    yield repr(dataset.transform).encode()
    if isinstance(dataset, FolderDataset):
        root = os.fsencode(dataset.images.root)
        for file in dataset.images.files.tolist():
            yield _state(b"%s/%s" % (root, file), file)
    elif isinstance(dataset, HFDataset):
        for path in sorted(file["filename"] for file in dataset.part.rows.cache_files):
            entry = os.stat(path)
            yield f"{os.path.basename(path)} {entry.st_size} {entry.st_mtime_ns}".encode()
        yield f"{dataset.part.rows.split} {dataset.part.image_column}".encode()
        yield dataset.indices.tobytes()
        yield dataset.labels.tobytes()
    else:
        wrapped: Any = dataset.wrapped
        parts = [getattr(wrapped, name, None) for name in ("train", "split")]
        yield f"{type(wrapped).__name__} {parts} {len(wrapped)}".encode()
        yield np.ascontiguousarray(dataset.indices).tobytes()
        labels = getattr(wrapped, "targets", None)
        yield np.asarray(getattr(wrapped, "labels", ()) if labels is None else labels).tobytes()
        if isinstance(wrapped, DatasetFolder):
            for path, _ in wrapped.samples:
                yield _state(path, os.fsencode(os.path.relpath(path, wrapped.root)))


def _state(path: str | bytes, name: bytes) -> bytes:
    """Name, size and time of change of a file."""
    entry = os.stat(path)
    return b"%s\0%d %d" % (name, entry.st_size, entry.st_mtime_ns)
