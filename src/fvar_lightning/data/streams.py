"""HFStream: training images read as they arrive, each shard by one reader, resumable at any sample."""

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fvar_lightning.data.hf import HFRows, load_encoded
from fvar_lightning.data.images import ImageTransform
from fvar_lightning.data.sampler import StreamDraw

CHUNK = 64
"""Rows asked for at once."""
SLOTS = 2**20


class _Row(NamedTuple):
    shard: int
    number: int
    image: Any
    label: Any


class HFStream(Dataset[tuple[Tensor, int]]):
    """A stream of `datasets` as a data set whose samples are asked for in their order, by a `StreamSampler`.

    Readers (the workers of all ranks) share the shards of the stream, whose order is drawn for every epoch; where there
    are fewer shards than readers, several take turns at the rows of one. A reader shuffles `buffer` rows at a time and
    begins its share again when it ends before the epoch does. So a sample depends on (seed, epoch, reader, position)
    alone. A run that resumes reads again, without decoding, what the epoch has read before.

    An image that cannot be read, or has no label, is reported once, counted, and replaced by another of its buffer.

    Args:
        part: of the data set.
        class_names: name of every label.
        transform: crop.
        samples: in an epoch, over all readers.
        buffer: rows.
        seed: of order and augmentation.
        max_unreadable: that many may be unreadable; by default 1 % of an epoch, at least 10.
    """

    def __init__(
        self,
        part: HFRows,
        class_names: list[str],
        transform: ImageTransform,
        samples: int,
        *,
        buffer: int = 1000,
        seed: int = 0,
        max_unreadable: int | None = None,
    ) -> None:
        self.part = part
        self.class_names = class_names
        self.transform = transform
        self.samples = samples
        self.buffer = buffer
        self.seed = seed
        self.max_unreadable = max(10, math.ceil(samples / 100)) if max_unreadable is None else max_unreadable
        # which rows, in memory that workers share, at a place that depends on the row: found twice, it counts once
        self.unreadable = torch.zeros(SLOTS, dtype=torch.int64, device="cpu").share_memory_()
        self.opened: tuple[int, int, int] | None = None
        self.first = 0
        self.block: list[_Row] = []
        self.blocks: Iterator[list[_Row]] = iter(())

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, item: int | StreamDraw) -> tuple[Tensor, int]:
        """(uint8 tensor (3, H, W), label) of a draw; a plain index is a position in epoch 0 of a single reader.

        Raises:
            RuntimeError: if too many images are unreadable.
        """
        draw = item if isinstance(item, StreamDraw) else StreamDraw(0, 0, 1, item)
        if self.opened != draw[:3] or draw.position < self.first:
            self.opened, self.first, self.block = draw[:3], 0, []
            self.blocks = self._read(draw.epoch, draw.reader, draw.readers)
        while draw.position >= self.first + len(self.block):
            self.first += len(self.block)
            self.block = next(self.blocks)
        start = draw.position - self.first
        rng = np.random.default_rng((self.seed, draw.epoch, draw.reader, draw.position))
        for row in self.block[start:] + self.block[:start]:
            result = self._try(row)
            if result is not None:
                image, label = result
                return self.transform(image, rng), label
        raise RuntimeError(f"none of {len(self.block)} images can be read, e.g. {self._name(self.block[0][:2])}")

    def _read(self, epoch: int, reader: int, readers: int) -> Iterator[list[_Row]]:
        """Shuffled blocks of one reader, without end."""
        rows, shards = self.part.rows, self.part.rows.num_shards
        # 1 where every reader has shards of its own
        sharers, turn = len(range(reader % shards, readers, shards)), reader // shards
        size = sharers * math.ceil(CHUNK / sharers)
        order = np.random.default_rng((self.seed, epoch)).permutation(shards)
        mine = order[reader % shards :: min(readers, shards)].tolist()
        for again in itertools.count():
            shuffle = np.random.default_rng((self.seed, epoch, reader, again))
            waiting: list[_Row] = []
            empty = True
            for shard in mine:
                for start, chunk in zip(itertools.count(0, size), rows.shard(shards, shard).iter(size), strict=False):
                    waiting += self._rows(shard, start, chunk)[turn::sharers]
                    while len(waiting) >= self.buffer:
                        empty = False
                        yield _shuffled(waiting[: self.buffer], shuffle)
                        del waiting[: self.buffer]
            if waiting:
                yield _shuffled(waiting, shuffle)
            elif empty:
                raise RuntimeError(f"{self.part.origin} is too short for {readers} readers (ranks * num_workers)")

    def _rows(self, shard: int, start: int, chunk: dict[str, list[Any]]) -> list[_Row]:
        images = chunk[self.part.image_column]
        labels = [0] * len(images) if self.part.label_column is None else chunk[self.part.label_column]
        return [_Row(shard, start + i, *pair) for i, pair in enumerate(zip(images, labels, strict=True))]

    def _try(self, row: _Row) -> tuple[Image.Image, int] | None:
        slot = (row.shard * 1_000_003 + row.number) % SLOTS
        mark = 1 + (row.shard << 32) + row.number
        if self.unreadable[slot] == mark:
            return None
        try:
            if row.label is None or not 0 <= row.label < len(self.class_names):
                raise ValueError(f"label {row.label} is none of the {len(self.class_names)} classes")
            return load_encoded(row.image), int(row.label)
        except MemoryError:
            raise
        except Exception as error:  # as in ImageDataset
            self.unreadable[slot] = mark
            warnings.warn(f"unreadable image {self._name(row[:2])} replaced by another: {error!r}", stacklevel=2)
        if self.num_unreadable > self.max_unreadable:
            raise RuntimeError(f"too many unreadable images (max_unreadable is {self.max_unreadable}): {self.report()}")
        return None

    def _name(self, place: tuple[int, int]) -> str:
        return f"{self.part.origin} shard {place[0]} row {place[1]}"

    @property
    def num_unreadable(self) -> int:
        """Images found unreadable so far, in all workers of this rank."""
        return int(self.unreadable.count_nonzero())

    def report(self) -> str:
        """How many images were unreadable, and which (the first ten)."""
        marks = self.unreadable[self.unreadable > 0].sort().values - 1
        names = ", ".join(self._name((mark >> 32, mark & 0xFFFFFFFF)) for mark in marks[:10].tolist())
        return f"{len(marks)} images: {names}" + (", ..." if len(marks) > 10 else "")


def _shuffled(rows: list[_Row], rng: np.random.Generator) -> list[_Row]:
    return [rows[i] for i in rng.permutation(len(rows))]
