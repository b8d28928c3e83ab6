"""Data sets of images in folders: (uint8 tensor (3, H, W), label), whatever files are broken."""

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fvar_lightning.data.images import EXTENSIONS, ImageTransform, load_image
from fvar_lightning.data.sampler import Draw


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Pictures with labels, cropped and flipped by a generator that depends on (seed, epoch, index) alone.

    So a sample is the same whatever worker, rank or resumed run asks for it. A picture that cannot be read is reported
    once, counted in memory that workers share with the main process, and replaced by the next readable one.

    Args:
        length: number of pictures.
        class_names: name of every label.
        transform: crop.
        seed: of the augmentation.
        max_unreadable: that many pictures may be unreadable; by default 1 % of them, at least 10.
    """

    def __init__(
        self,
        length: int,
        class_names: list[str],
        transform: ImageTransform,
        *,
        seed: int = 0,
        max_unreadable: int | None = None,
    ) -> None:
        self.length = length
        self.class_names = class_names
        self.transform = transform
        self.seed = seed
        self.max_unreadable = max(10, math.ceil(length / 100)) if max_unreadable is None else max_unreadable
        self.unreadable = torch.zeros(length, dtype=torch.bool, device="cpu").share_memory_()

    def read(self, index: int) -> tuple[Image.Image, int]:
        """RGB picture and label; raises whatever the decoder raises."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the picture comes from, for messages."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, int]:
        """(uint8 tensor (3, H, W), label) of a draw; a plain index is a draw of epoch 0.

        Raises:
            RuntimeError: if too many pictures are unreadable.
        """
        epoch, index = item if isinstance(item, Draw) else (0, item)
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is not in 0..{self.length - 1}")
        for candidate in range(index, index + self.length):
            result = self._try(candidate % self.length)
            if result is not None:
                image, label = result
                return self.transform(image, np.random.default_rng((self.seed, epoch, index))), label
        raise RuntimeError(f"none of the {self.length} images can be read, e.g. {self.name(index)}")

    def _try(self, index: int) -> tuple[Image.Image, int] | None:
        if self.unreadable[index]:
            return None
        try:
            return self.read(index)
        except MemoryError:
            raise
        except Exception as error:  # a broken file raises nearly anything: OSError, SyntaxError, struct.error, ...
            self.unreadable[index] = True
            warnings.warn(f"unreadable image {self.name(index)} replaced by another: {error!r}", stacklevel=2)
        if self.num_unreadable > self.max_unreadable:
            raise RuntimeError(f"too many unreadable images (max_unreadable is {self.max_unreadable}): {self.report()}")
        return None

    @property
    def num_unreadable(self) -> int:
        """Pictures found unreadable so far, in all workers."""
        return int(self.unreadable.sum())

    def report(self) -> str:
        """How many pictures were unreadable, and which (the first ten)."""
        found = self.unreadable.nonzero().flatten().tolist()
        names = ", ".join(self.name(i) for i in found[:10]) + (", ..." if len(found) > 10 else "")
        return f"{len(found)} of {self.length} images: {names}"


class ImageList(NamedTuple):
    """Image files of a folder. Arrays, not lists: worker processes share them instead of copying them."""

    root: Path
    files: np.ndarray
    """(N,) bytes, paths relative to the root."""
    labels: np.ndarray
    """(N,) int64."""


class FolderDataset(ImageDataset):
    """The files of an `ImageList`. Arguments as for `ImageDataset`."""

    def __init__(self, images: ImageList, class_names: list[str], transform: ImageTransform, **options: Any) -> None:
        super().__init__(len(images.files), class_names, transform, **options)
        self.images = images

    def name(self, index: int) -> str:
        return str(self.images.root / os.fsdecode(self.images.files[index]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.name(index)), int(self.images.labels[index])


def scan_folder(source: str | Path, val_fraction: float = 0.1) -> tuple[list[str], ImageList, ImageList]:
    """Class names (sorted), training and validation images of a folder.

    The folder holds class folders (searched to any depth), or images alone: one class, named after the folder. If it
    holds `train` and `val` folders, these are the two parts; otherwise `val_fraction` of every class is held out,
    chosen by a hash of the path: the same on every machine, and at least one image of a class that has two.

    Raises:
        ValueError: if the folder is missing or holds no images, if a class has none, if images lie beside class
            folders, or if `val` has a class that `train` lacks.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    source = Path(source).expanduser()
    if not source.is_dir():
        raise ValueError(f"source {str(source)!r} is not a folder")
    train_root, val_root = source / "train", source / "val"
    if not train_root.is_dir():
        if val_root.is_dir():
            raise ValueError(f"source {str(source)!r} holds a folder val, but no folder train")
        train_root = source
    train = _scan_classes(train_root, source.resolve().name)
    if train_root != source and val_root.is_dir():
        val = _scan_classes(val_root, source.resolve().name)
        unknown = sorted(val.keys() - train.keys())
        if unknown:
            raise ValueError(f"{val_root} has classes that {train_root} lacks: {', '.join(unknown)}")
    else:
        val_root, val = train_root, {name: _held_out(files, val_fraction) for name, files in train.items()}
        train = {name: sorted(set(files) - set(val[name])) for name, files in train.items()}
    names = list(train)
    return names, _image_list(train_root, train, names), _image_list(val_root, val, names)


def _scan_classes(root: Path, flat_name: str) -> dict[str, list[str]]:
    """Sorted image paths, relative to the root, of every class."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    classes = {name: _find_images(root, name) for name in folders}
    flat = sorted(entry.name for entry in os.scandir(root) if entry.is_file() and _is_image(entry.name))
    accepted = " ".join(EXTENSIONS)
    if not flat and not any(classes.values()):
        raise ValueError(f"{root} holds no images, nor class folders with images (files ending in {accepted})")
    if flat:
        mixed = [name for name, files in classes.items() if files]
        if mixed:
            raise ValueError(f"{root} holds images ({flat[0]}, ...) beside class folders ({mixed[0]}, ...)")
        return {flat_name: flat}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise ValueError(f"class folders of {root} without images (files ending in {accepted}): {', '.join(empty)}")
    return classes


def _find_images(root: Path, name: str) -> list[str]:
    walk = os.walk(root / name, followlinks=True)
    found = (os.path.join(folder, file) for folder, _, files in walk for file in files if _is_image(file))
    return sorted(os.path.relpath(path, root) for path in found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _held_out(files: Sequence[str], fraction: float) -> list[str]:
    if fraction == 0 or len(files) == 1:
        return []
    count = min(max(1, round(fraction * len(files))), len(files) - 1)
    by_hash = sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(Path(file).as_posix())).digest())
    return sorted(by_hash[:count])


def _image_list(root: Path, classes: dict[str, list[str]], names: list[str]) -> ImageList:
    pairs = [(os.fsencode(file), names.index(name)) for name in names for file in classes.get(name, [])]
    files = np.array([file for file, _ in pairs], dtype=np.bytes_)
    return ImageList(root, files, np.array([label for _, label in pairs], dtype=np.int64))
