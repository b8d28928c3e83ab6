"""TokenCache: what the tokenizers make of a data set, in a folder, written once, read by stage 2.

    index.json          what the tokens are and of which images, and how rows lie in shards; written first
    shard-000000.npy    rows, see `TokenMeta.dtype`; there whole or not at all

A row is a crop, its tokens of all scales in a sequence; several crops of an image are so many rows. The cache is
complete when all its shards are there.

Legend: N rows of the cache, R ranks that write it, n rows of a shard.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fvar_lightning.atomic import replacing, write_json
from fvar_lightning.data.tokens import TokenMeta, disagreements, with_deviations

FORMAT = 2
ROWS_PER_SHARD = 32768
_FILE = re.compile(r"(shard|structure|alias|labels)-\d{6,}\.npy|index\.json")
"""Files of a cache; the three names in the middle are those of format 1."""


@dataclass(frozen=True)
class ShardLayout:
    """Where rows lie: dealt to the ranks in turn, as evaluation loaders deal images, by each into shards of its own.

    So row i is crop i of the images in order, however many ranks wrote it. R consecutive shards hold R n consecutive
    rows.

    Args:
        rows: N.
        ranks: R.
        rows_per_shard: n; the last R shards may have fewer.

    Raises:
        ValueError: if one of them is not positive.
    """

    rows: int
    ranks: int = 1
    rows_per_shard: int = ROWS_PER_SHARD

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def num_shards(self) -> int:
        """Shards of all ranks."""
        blocks, rest = divmod(self.rows, self.ranks * self.rows_per_shard)
        return blocks * self.ranks + min(rest, self.ranks)

    def length(self, shard: int) -> int:
        """Rows of a shard."""
        block, rank = divmod(shard, self.ranks)
        first = block * self.ranks * self.rows_per_shard + rank
        return len(range(first, self.rows, self.ranks)[: self.rows_per_shard])

    def find(self, row: int) -> tuple[int, int]:
        """Shard of a row, and its place there."""
        turn, rank = divmod(row, self.ranks)
        block, place = divmod(turn, self.rows_per_shard)
        return block * self.ranks + rank, place


@dataclass(frozen=True)
class TokenCache:
    """A folder of shards and what its index says.

    Args:
        folder: is made by `claim`.
        tokens: what the tokens are.
        layout: of the rows.
        images: which images they are of, plain values.
        writing: how they are written, as far as their last bits depend on it, plain values.
    """

    folder: Path
    tokens: TokenMeta
    layout: ShardLayout
    images: dict[str, Any] = field(default_factory=dict)
    writing: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> "TokenCache":
        """The cache in a folder, complete or not.

        Raises:
            ValueError: if there is none, or one of another format.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"path {str(folder)!r} is not a folder; a token cache is expected")
        index = folder / "index.json"
        if not index.is_file():
            raise ValueError(f"path {str(folder)!r} holds no index.json: no token cache")
        content = _read_index(index)
        try:
            tokens, layout = TokenMeta.of(content["tokens"]), ShardLayout(**content["layout"])
            return cls(folder, tokens, layout, content["images"], content["writing"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index} cannot be used: {error!r}; write the cache again") from error

    @property
    def index(self) -> Path:
        """Its description."""
        return self.folder / "index.json"

    def claim(self, replace: bool = False) -> None:
        """Note in an empty folder what is written there, or make sure that what is there is part of the same.

        Args:
            replace: remove another cache instead of refusing the folder.

        Raises:
            ValueError: if the folder holds another cache; the message says what differs.
        """
        described = {name: value for name, value in asdict(self).items() if name != "folder"}
        wanted = json.loads(json.dumps({"format": FORMAT, **described}))
        try:
            self._refuse_another(wanted)
        except ValueError:
            if not replace:
                raise
            remove_tokens(self.folder)
        if not self.index.is_file():
            write_json(self.index, wanted)
        for left_over in self.folder.glob("*.partial"):
            left_over.unlink(missing_ok=True)

    def _refuse_another(self, wanted: Mapping[str, Any]) -> None:
        remedy = "give another folder, or remove it"
        if self.index.is_file():
            try:
                found = _read_index(self.index)
            except ValueError as error:
                raise ValueError(f"{error}: {remedy}") from error
            tokens = with_deviations(found.get("tokens", {}), wanted["tokens"])
            if differing := disagreements(found | {"tokens": tokens}, wanted):
                raise ValueError(f"folder {str(self.folder)!r} holds a token cache of {differing}: {remedy}")
        elif any(_FILE.fullmatch(path.name) for path in self.folder.glob("*.npy")):
            raise ValueError(f"folder {str(self.folder)!r} holds shards of tokens, but no index.json: {remedy}")

    def path(self, shard: int) -> Path:
        """Of a shard."""
        return self.folder / f"shard-{shard:06d}.npy"

    def write(self, shard: int, rows: np.ndarray) -> None:
        """Write (or replace) a shard.

        Args:
            shard: its number.
            rows: all of it, see `TokenMeta.rows`.
        """
        assert rows.shape == (self.layout.length(shard),)
        with replacing(self.path(shard)) as beside, beside.open("wb") as file:
            np.save(file, rows)

    def first_byte(self, shard: int) -> int:
        """Where in its file the rows of a shard begin, which is there to its last byte.

        Raises:
            FileNotFoundError: if it is missing.
            OSError: if it cannot be opened, be it for want of file descriptors.
            ValueError: if it is broken, or of another cache.
        """
        path = self.path(shard)
        try:
            rows: Any = np.lib.format.open_memmap(path, mode="r")
        except (EOFError, ValueError) as error:
            raise ValueError(f"token cache is broken: {path}: {error}; write it again") from error
        wanted = (self.layout.length(shard),), self.tokens.dtype
        if (rows.shape, rows.dtype) != wanted:
            raise ValueError(
                f"{path} holds rows {rows.shape} of {rows.itemsize} bytes, {self.index} tells of rows {wanted[0]} of "
                f"{wanted[1].itemsize}: another cache's; write it again"
            )
        return rows.offset

    def missing(self) -> list[int]:
        """Shards that are not there, or broken."""
        return [shard for shard in range(self.layout.num_shards) if not self._is_whole(shard)]

    def _is_whole(self, shard: int) -> bool:
        try:
            self.first_byte(shard)
        except (FileNotFoundError, ValueError):
            return False
        return True


def remove_tokens(folder: str | Path) -> None:
    """Remove the cache in a folder, also one of an earlier format; other files stay."""
    for path in Path(folder).glob("*"):
        if _FILE.fullmatch(path.name):
            path.unlink()


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        found = content["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({error!r}); write the cache again") from error
    if found != FORMAT:
        raise ValueError(f"{path} is of format {found}, not {FORMAT} as this version reads; write the cache again")
    return content
