"""TokenDataset: the rows of a token cache, in any order, with few files open.

Legend: L tokens in all scales together.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.data.sampler import Draw
from fvar_lightning.data.token_cache import TokenCache
from fvar_lightning.data.tokens import TokenMeta

MAX_OPEN = 64
"""Shards that a data set keeps open. Many systems grant a process 256 files, and a run has two data sets."""


class TokenDataset(Dataset[tuple[Tensor, Tensor | None, int]]):
    """Rows of a cache: (structure (L,), alias (L,) or None, label), int64. Nothing is random here.

    Rows are read one by one, so that memory does not grow with the cache; shards are opened when a row of theirs is
    asked for.

    Args:
        folder: of a complete cache.

    Raises:
        ValueError: if the folder, its index or a shard is missing, incomplete or broken.
        OSError: if a file cannot be opened, be it for want of file descriptors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.cache = TokenCache.open(folder)
        self.starts = np.array([self._first_byte(shard) for shard in range(self.cache.layout.num_shards)])
        self.dtype = self.meta.dtype
        self._opened: OrderedDict[int, BinaryIO] = OrderedDict()

    def _first_byte(self, shard: int) -> int:
        try:
            return self.cache.first_byte(shard)
        except FileNotFoundError:
            total, missing = self.cache.layout.num_shards, self.cache.missing()
            raise ValueError(
                f"token cache is incomplete: {len(missing)} of {total} shards are missing, e.g. "
                f"{self.cache.path(shard)}; the `fvar predict` that began it goes on with it"
            ) from None

    @property
    def meta(self) -> TokenMeta:
        """What the tokens are."""
        return self.cache.tokens

    def __getstate__(self) -> dict[str, Any]:
        # a worker opens files of its own
        return {**self.__dict__, "_opened": OrderedDict()}

    def __len__(self) -> int:
        return self.cache.layout.rows

    def name(self, row: int) -> str:
        """Where a row comes from, for messages."""
        return f"row {row} of {self.cache.folder}"

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, Tensor | None, int]:
        index = item.index if isinstance(item, Draw) else item
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is not in 0..{len(self) - 1}")
        row = self._read(*self.cache.layout.find(index))
        structure = torch.from_numpy(row["structure"].astype(np.int64))
        alias = torch.from_numpy(row["alias"].astype(np.int64)) if self.meta.alias else None
        return structure, alias, int(row["label"])

    def _read(self, shard: int, place: int) -> np.void:
        size = self.dtype.itemsize
        # not seek and read: forked workers share the position in a file that was open before
        data = os.pread(self._open(shard).fileno(), size, int(self.starts[shard]) + place * size)
        if len(data) < size:
            raise ValueError(f"token cache is broken: {self.cache.path(shard)} ends early; write it again")
        return np.frombuffer(data, self.dtype)[0]

    def _open(self, shard: int) -> BinaryIO:
        if shard in self._opened:
            self._opened.move_to_end(shard)
        else:
            while len(self._opened) >= MAX_OPEN:
                self._opened.popitem(last=False)[1].close()
            self._opened[shard] = self.cache.path(shard).open("rb", buffering=0)
        return self._opened[shard]

    def collate(self, rows: list[tuple[Tensor, Tensor | None, int]]) -> TokenBatch:
        """A batch of rows, its tokens split into scales."""
        structure, alias, labels = zip(*rows, strict=True)
        split = [
            [] if part[0] is None else list(torch.stack(part).split(self.meta.lengths, dim=1))
            for part in (structure, alias)
        ]
        return TokenBatch(split[0], split[1], torch.tensor(labels))
