"""TokenWriter: the token cache of stage 2, written by `fvar predict --data.predict=tokens`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.token_cache import ROWS_PER_SHARD, ShardLayout, TokenCache
from fvar_lightning.tasks.fvar import FVARTask


class TokenWriter(BasePredictionWriter):
    """Writes token caches for `TokenDataModule`, shard by shard; see `TokenCache` for what is in the folder.

    Started again after an interruption, a run encodes the rows of the shards that are missing, and ends with the same
    files as an undisturbed one. With other tokenizers, images, ranks, batches or shards the folder is refused.
    Predictions are not collected in memory.

    Args:
        folder: where to; seen by all ranks.
        rows_per_shard: of a rank, rounded up to whole batches. So many are held in memory until they are written (90 MB
            at 256 px, 1.2 GB at 1024 px), and encoded again after an interruption.
        replace: remove another cache from the folder instead of refusing it.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(self, folder: str, rows_per_shard: int = ROWS_PER_SHARD, replace: bool = False) -> None:
        super().__init__("batch")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be positive, got {rows_per_shard}")
        self.folder = Path(folder)
        self.rows_per_shard = rows_per_shard
        self.replace = replace
        self.cache: TokenCache | None = None
        self.shard = 0
        self.rows: list[np.ndarray] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module ask which rows are there; it then raises a ValueError if the folder holds others.

        Raises:
            ValueError: if the data module asks for no tokens.
        """
        if stage != "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, FVARTask) or not isinstance(data, ImageDataModule):
            raise ValueError("TokenWriter needs a FVARTask and an ImageDataModule")
        if data.predict != "tokens":
            raise ValueError(f"predict of the data module must be 'tokens' for a TokenWriter, got {data.predict!r}")
        trainer.predict_loop.return_predictions = False
        # not yet: the weights, which the folder must fit, are loaded later
        data.finished_rows = lambda rows, batch_size: self._begin(trainer, pl_module, data, rows, batch_size)

    def _begin(self, trainer: Trainer, task: FVARTask, data: ImageDataModule, rows: int, batch_size: int) -> int:
        """Claim the folder; rows that are there, up to the first that any rank misses."""
        whole_batches = -(-self.rows_per_shard // batch_size) * batch_size
        layout = ShardLayout(rows, trainer.world_size, whole_batches)
        tokens = replace(task.token_meta(), class_names=data.class_names)
        cache = self.cache = TokenCache(self.folder, tokens, layout)
        missing: list[int] | str = []
        if trainer.is_global_zero:
            writing = {"batch_size": batch_size, "precision": str(trainer.precision)}
            try:
                replace(cache, images=data.cached_images(), writing=writing).claim(self.replace)
                missing = cache.missing()
            except ValueError as error:
                missing = str(error)
        # one rank looks, so that all share the same work; a refusal ends all of them
        missing = trainer.strategy.broadcast(missing)
        if isinstance(missing, str):
            raise ValueError(missing)
        if not missing:
            rank_zero_info(f"the token cache {self.folder} is complete")
            return rows
        block = missing[0] // layout.ranks
        self.shard, self.rows = block * layout.ranks + trainer.global_rank, []
        finished = block * layout.ranks * layout.rows_per_shard
        if finished:
            rank_zero_info(f"{finished} of {rows} rows are in {self.folder} already")
        return finished

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self.cache is not None
        self.rows.append(self.cache.tokens.rows(prediction))
        if sum(map(len, self.rows)) == self.cache.layout.length(self.shard):
            self.cache.write(self.shard, np.concatenate(self.rows))
            self.shard, self.rows = self.shard + self.cache.layout.ranks, []

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell if the run was too short for all rows."""
        assert self.cache is not None
        trainer.strategy.barrier()
        if trainer.is_global_zero and (missing := self.cache.missing()):
            total = self.cache.layout.num_shards
            rank_zero_info(f"{len(missing)} of {total} shards are missing in {self.folder}: the same command goes on")
