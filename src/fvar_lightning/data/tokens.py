"""Token caches: what the tokenizers make of a data set, written once, read memory-mapped by stage 2.

A cache is a folder of shards, three files each, and an index that is written last:

    structure-000000.npy  (N, L) uint16     alias-000000.npy  (N, L) uint16, if there are alias tokens
    labels-000000.npy     (N,) int64        index.json

A row is a crop, its tokens of all scales in a sequence; several crops of an image are so many rows.

Legend: N rows of a shard, L tokens in all scales together, S scales.
"""

import bisect
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fvar_lightning.atomic import replacing, write_json
from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.data.sampler import Draw

_LIMIT = 2**16


@dataclass(frozen=True)
class TokenMeta:
    """What a cache holds.

    Args:
        patch_nums: side of every token map.
        class_names: name of every label.
        structure_vocab: entries of the structure codebook.
        alias_vocab: entries of the alias codebook; 0 if the cache holds no alias tokens.
        crops_per_image: rows of every image.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    patch_nums: tuple[int, ...]
    class_names: list[str]
    structure_vocab: int
    alias_vocab: int = 0
    crops_per_image: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        for name, least in (("structure_vocab", 1), ("alias_vocab", 0)):
            if not least <= getattr(self, name) <= _LIMIT:
                raise ValueError(f"{name} must lie in {least}..{_LIMIT}, got {getattr(self, name)}")

    @property
    def lengths(self) -> list[int]:
        """Tokens of every scale."""
        return [n * n for n in self.patch_nums]


def _shard_file(folder: Path, part: str, shard: int) -> Path:
    return folder / f"{part}-{shard:06d}.npy"


def write_tokens(folder: str | Path, shard_index: int, structure: Tensor, alias: Tensor | None, labels: Tensor) -> None:
    """Write (or replace) one shard. Every rank may write its own; `write_index` completes the cache.

    Args:
        folder: of the cache, made if it is missing.
        shard_index: number of the shard; rows are read in the order of these numbers.
        structure: (N, L) integers in 0..65535.
        alias: the same for the alias tokens, or None.
        labels: (N,) integers.

    Raises:
        ValueError: if shapes do not match or a token does not fit.
    """
    folder = Path(folder)
    if structure.ndim != 2 or len(structure) != len(labels) or labels.ndim != 1:
        raise ValueError(
            f"structure must measure (N, L) and labels (N,), got {tuple(structure.shape)} and {tuple(labels.shape)}"
        )
    if alias is not None and alias.shape != structure.shape:
        raise ValueError(f"alias must measure {tuple(structure.shape)} like structure, got {tuple(alias.shape)}")
    tokens = {"structure": structure} | ({} if alias is None else {"alias": alias})
    arrays = {}
    for part, values in tokens.items():
        if values.numel() and not (values.min() >= 0 and values.max() < _LIMIT):
            raise ValueError(f"{part} must lie in 0..{_LIMIT - 1}, got {int(values.min())}..{int(values.max())}")
        arrays[part] = values.cpu().numpy().astype(np.uint16)
    arrays["labels"] = labels.cpu().numpy().astype(np.int64)
    for part, array in arrays.items():
        with replacing(_shard_file(folder, part, shard_index)) as beside, beside.open("wb") as file:
            np.save(file, array)


def write_index(folder: str | Path, meta: TokenMeta) -> None:
    """Complete a cache: check its shards and list them. One process does it, when all shards are written.

    Raises:
        ValueError: if there are no shards, or one is incomplete or does not match `meta`.
    """
    folder = Path(folder)
    found = sorted(folder.glob("structure-*.npy"))
    if not found:
        raise ValueError(f"folder {str(folder)!r} holds no shards of tokens")
    shards = []
    for path in found:
        shard = int(path.stem.split("-")[1])
        shards.append({"shard": shard, "rows": len(_open_shard(folder, shard, meta)["labels"])})
    write_json(folder / "index.json", {"format": 1, **asdict(meta), "shards": shards})


def remove_tokens(folder: str | Path) -> None:
    """Remove the index and the shards of an earlier cache, so that none of them is taken for one of a new cache."""
    folder = Path(folder)
    (folder / "index.json").unlink(missing_ok=True)
    for path in folder.glob("*.npy"):
        if re.fullmatch(r"(structure|alias|labels)-\d{6,}\.npy", path.name):
            path.unlink()


def _open_shard(folder: Path, shard: int, meta: TokenMeta) -> dict[str, np.ndarray]:
    """The memory-mapped arrays of a shard.

    Raises:
        ValueError: if a file is missing or broken, or has another shape than the others or `meta` ask for.
    """
    parts = ["structure", *(["alias"] if meta.alias_vocab else []), "labels"]
    arrays = {}
    for part in parts:
        path = _shard_file(folder, part, shard)
        try:
            arrays[part] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise ValueError(f"token cache is incomplete: {path} is missing; write it again") from None
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"token cache is broken: {path}: {error}; write it again") from error
    rows, length = len(arrays["labels"]), sum(meta.lengths)
    for part in parts[:-1]:
        if arrays[part].shape != (rows, length):
            raise ValueError(
                f"{_shard_file(folder, part, shard)} must measure {(rows, length)} for patch_nums "
                f"{meta.patch_nums}, it measures {arrays[part].shape}"
            )
    return arrays


class TokenDataset(Dataset[tuple[Tensor, Tensor | None, int]]):
    """Rows of a cache: (structure (L,), alias (L,) or None, label), int64. Nothing is random here.

    Args:
        folder: of a complete cache.

    Raises:
        ValueError: if the folder, its index or a shard is missing, incomplete or broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not self.folder.is_dir():
            raise ValueError(f"path {str(folder)!r} is not a folder; a token cache is expected")
        if not index.is_file():
            raise ValueError(f"path {str(folder)!r} holds no index.json: no token cache, or one not written to its end")
        try:
            content = json.loads(index.read_text())
            shards = content.pop("shards")
            if content.pop("format") != 1:
                raise ValueError("another format than this version reads")
            self.meta = TokenMeta(**content)
            self.shards = [shard["shard"] for shard in shards]
            self.ends = list(itertools.accumulate(shard["rows"] for shard in shards))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index} cannot be used: {error!r}; write the cache again") from error
        self._arrays: list[dict[str, np.ndarray]] | None = None
        for shard, opened in zip(shards, self.arrays, strict=True):
            if len(opened["labels"]) != shard["rows"]:
                raise ValueError(f"{index} tells of {shard['rows']} rows in shard {shard['shard']}, another cache's")

    @property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        """Memory-mapped arrays of every shard."""
        if self._arrays is None:
            self._arrays = [_open_shard(self.folder, shard, self.meta) for shard in self.shards]
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory-mapped array copies it whole; a worker opens its own
        return {**self.__dict__, "_arrays": None}

    def __len__(self) -> int:
        return self.ends[-1]

    def name(self, row: int) -> str:
        """Where a row comes from, for messages."""
        return f"row {row} of {self.folder}"

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, Tensor | None, int]:
        row = item.index if isinstance(item, Draw) else item
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in 0..{len(self) - 1}")
        shard = bisect.bisect_right(self.ends, row)
        arrays = self.arrays[shard]
        row -= self.ends[shard] - len(arrays["labels"])
        tokens = [torch.from_numpy(arrays[part][row].astype(np.int64)) for part in arrays if part != "labels"]
        return tokens[0], tokens[1] if len(tokens) > 1 else None, int(arrays["labels"][row])

    def collate(self, rows: list[tuple[Tensor, Tensor | None, int]]) -> TokenBatch:
        """A batch of rows, its tokens split into scales."""
        structure, alias, labels = zip(*rows, strict=True)
        split = [
            [] if part[0] is None else list(torch.stack(part).split(self.meta.lengths, dim=1))
            for part in (structure, alias)
        ]
        return TokenBatch(split[0], split[1], torch.tensor(labels))
