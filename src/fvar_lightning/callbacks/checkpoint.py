"""LastCheckpoint: the newest checkpoint of a run, its end included."""

import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fvar_lightning.atomic import remove_partial, replace_folder
from fvar_lightning.callbacks.files import AtomicCheckpointIO


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, replaced every so many steps and where training ends, wherever between two of these that is.

    The file is replaced as a whole (`AtomicCheckpointIO`), and so is the folder of a sharded checkpoint; always between
    two optimiser steps. SIGTERM, by which SLURM and other schedulers announce that they will kill a run, has it written
    at the end of the running step (or of the validation that is running) and then ends the process with status 143, on
    all ranks, whichever got the signal. With several processes every step ends with one all-reduced flag for that.

    Args:
        dirpath: folder; by default ``checkpoints`` in the logger's. A ``last.ckpt`` of another run in it is left alone,
            this run's is then ``last-v1.ckpt``.
        every_n_train_steps: optimiser steps between two.

    Raises:
        ValueError: if every_n_train_steps is not positive.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be positive, got {every_n_train_steps}")
        # 0: ModelCheckpoint itself saves nothing
        super().__init__(dirpath, save_last=True, save_top_k=0, every_n_train_steps=0)
        self.interval = every_n_train_steps
        self.terminated = False
        self.step = 0
        self.saved = 0
        """Step of the file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints written atomically, and remove what a killed run left half-written."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            assert self.dirpath is not None
            resumed = [] if trainer.ckpt_path is None else [Path(trainer.ckpt_path).parent]
            for folder in (Path(self.dirpath), *resumed):
                remove_partial(folder, f"{self.CHECKPOINT_NAME_LAST}*{self.FILE_EXTENSION}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `ModelCheckpoint` keeps, but for the file's name: the checkpoint may be a copy that lies elsewhere."""
        super().load_state_dict(state_dict | {"last_model_path": ""})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM in the place of Lightning, which takes the listener away when the fit is over."""
        super().on_train_start(trainer, pl_module)
        self.terminated = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the step, to know when it ends."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or if the process is asked to end.

        Raises:
            SystemExit: with status 143 after SIGTERM.
        """
        if trainer.global_step == self.step:
            return  # gradients are being accumulated, which no checkpoint holds
        terminated = trainer.strategy.reduce_boolean_decision(self.terminated, all=False)
        if terminated or trainer.global_step % self.interval == 0 or _ends(trainer):
            self.save(trainer)
        if terminated:
            rank_zero_info(f"SIGTERM: step {trainer.global_step} is in {self.last_model_path}")
            raise SystemExit(128 + signal.SIGTERM)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the validation ended the run."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.is_last_batch and _ends(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training is over and its last step is not saved: by now Lightning counts the epoch as complete, and
        a run with max_steps that goes on from here may leave out the next one."""
        if trainer.fit_loop.done and self.saved != trainer.global_step:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: weight averaging has put the averages in the place of the weights by now."""

    def save(self, trainer: Any) -> None:
        """Replace this run's file."""
        if trainer.fast_dev_run:
            return
        self.saved = trainer.global_step
        if not self.last_model_path:
            self.last_model_path = self._new_path(trainer)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            # a folder, perhaps, that every rank writes into
            beside = f"{self.last_model_path}.{os.getpid()}.partial"
            trainer.save_checkpoint(beside)
            if trainer.is_global_zero:
                replace_folder(beside, self.last_model_path)
        else:
            trainer.save_checkpoint(self.last_model_path)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(self)

    def _new_path(self, trainer: Trainer) -> str:
        """The file this run goes on from if it is in the folder, otherwise one that is not there yet."""
        assert self.dirpath is not None
        for version in itertools.count():
            name = f"{self.CHECKPOINT_NAME_LAST}-v{version}" if version else self.CHECKPOINT_NAME_LAST
            path = os.path.join(self.dirpath, f"{name}{self.FILE_EXTENSION}")
            resumed = trainer.ckpt_path and os.path.abspath(trainer.ckpt_path) == os.path.abspath(path)
            if resumed or not self.file_exists(path, trainer):
                return path
        raise AssertionError


def _ends(trainer: Any) -> bool:
    """Whether the running step is the run's last."""
    return (trainer.should_stop or trainer.global_step == trainer.max_steps) and trainer.fit_loop.done
