"""Token caches of given tokens, for tests."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.data.token_cache import ShardLayout, TokenCache
from fvar_lightning.data.tokens import TokenizerIdentity, TokenMeta
from fvar_lightning.schedule import FocusSchedule

META = TokenMeta(
    FocusSchedule((1, 2), patch_size=4, focus_states=2),
    ["cat", "dog"],
    TokenizerIdentity(60000, "5" * 64, "disk", "view"),
    TokenizerIdentity(8, "a" * 64, "disk"),
)
WITHOUT_ALIAS = dataclasses.replace(META, alias=None)


def random_tokens(rows: int, meta: TokenMeta = META) -> tuple[Tensor, Tensor, Tensor]:
    """Structure tokens, alias tokens and labels."""
    generator = torch.Generator().manual_seed(rows)
    shape = rows, meta.schedule.length
    structure = torch.randint(0, meta.structure.vocab_size, shape, generator=generator)
    alias = torch.randint(0, 8, shape, generator=generator)
    return structure, alias, torch.randint(0, len(meta.class_names), (rows,), generator=generator)


def write_cache(folder: Path, rows: int = 7, meta: TokenMeta = META, **layout: int) -> tuple[Tensor, Tensor, Tensor]:
    """A complete cache of random tokens; which ones."""
    structure, alias, labels = random_tokens(rows, meta)
    cache = TokenCache(folder, meta, ShardLayout(rows, **layout))
    cache.claim()
    places = np.array([cache.layout.find(row) for row in range(rows)])
    for shard in range(cache.layout.num_shards):
        mine = torch.from_numpy(np.flatnonzero(places[:, 0] == shard))
        cache.write(shard, meta.rows(TokenBatch([structure[mine]], [alias[mine]] if meta.alias else [], labels[mine])))
    return structure, alias, labels
