"""LastCheckpoint: the newest checkpoint of a run, its end included."""

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, replaced every so many steps and where training ends, wherever between two of these that is.

    Args:
        dirpath: folder; by default ``checkpoints`` in the logger's.
        every_n_train_steps: optimiser steps between two.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 1000) -> None:
        super().__init__(dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training is over."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.fit_loop.done:
            assert self.dirpath is not None
            name = f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            self.last_model_path = self.last_model_path or str(Path(self.dirpath, name))
            trainer.save_checkpoint(self.last_model_path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: weight averaging has put the averages in the place of the weights by now."""
