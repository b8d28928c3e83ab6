"""Callbacks that write what `fvar predict` makes: pictures, or token caches."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from fvar_lightning.data.batches import SampleBatch, TokenBatch
from fvar_lightning.data.tokens import remove_tokens, write_index, write_tokens
from fvar_lightning.tasks.fvar import FVARTask


class SampleWriter(BasePredictionWriter):
    """Writes generated images as ``<folder>/<label>_<class>/<seed>.png``, each at once and whole.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__("batch")
        self.folder = Path(folder)

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
        if not isinstance(batch, SampleBatch):
            return
        assert isinstance(pl_module, FVARTask)
        for image, label, seed in zip(prediction, batch.labels.tolist(), batch.seeds.tolist(), strict=True):
            folder = self.folder / f"{label:04d}_{pl_module.class_names[label]}"
            folder.mkdir(parents=True, exist_ok=True)
            write_png(image, folder / f"{seed:06d}.png")


def write_png(image: Tensor, path: Path) -> None:
    """(3, H, W) in [-1, 1] -> an 8-bit PNG that is there whole or not at all."""
    pixels = image.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    beside = path.with_suffix(".partial")
    Image.fromarray(pixels).save(beside, format="PNG")
    os.replace(beside, path)


class TokenWriter(BasePredictionWriter):
    """Writes token caches for `TokenDataModule` from `fvar predict --data.predict=tokens`.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__("batch")
        self.folder = Path(folder)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove an earlier cache from the folder."""
        if trainer.is_global_zero:
            remove_tokens(self.folder)
        trainer.strategy.barrier()

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
        if not isinstance(prediction, TokenBatch):
            return
        alias = torch.cat(prediction.alias, dim=1) if prediction.alias else None
        shard = batch_idx * trainer.world_size + trainer.global_rank
        write_tokens(self.folder, shard, torch.cat(prediction.structure, dim=1), alias, prediction.labels)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the cache with its index."""
        assert isinstance(pl_module, FVARTask)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            write_index(self.folder, pl_module.token_meta())
