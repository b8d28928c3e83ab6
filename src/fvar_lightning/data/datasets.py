"""Data sets of images: (uint8 tensor (3, H, W), label), whatever files are broken."""

import math
import os
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fvar_lightning.data.images import ImageTransform, load_image
from fvar_lightning.data.listings import ImageList
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


class FolderDataset(ImageDataset):
    """The files of an `ImageList`. Arguments as for `ImageDataset`."""

    def __init__(self, images: ImageList, class_names: list[str], transform: ImageTransform, **options: Any) -> None:
        super().__init__(len(images.files), class_names, transform, **options)
        self.images = images

    def name(self, index: int) -> str:
        return str(self.images.root / os.fsdecode(self.images.files[index]))

    def read(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.name(index)), int(self.images.labels[index])


def hold_out(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of samples to keep, and of those held out: the same in every run, each sorted."""
    order = np.random.default_rng(0).permutation(count)
    held_out = round(fraction * count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
