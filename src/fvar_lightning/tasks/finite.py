"""FiniteTask: training that stops at a loss that is not finite, and names the batch."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from fvar_lightning.data.sampler import ResumableLoader
from fvar_lightning.weights.averages import state_of


class _Report(NamedTuple):
    """What a training step reported; its values have not been looked at yet."""

    step: int
    epoch: int
    batch: int
    names: tuple[str, ...]
    values: Tensor


class FiniteTask(LightningModule):
    """Stops where a term of the loss is NaN or infinite, before any checkpoint holds what comes of it.

    The terms are kept on their device and looked at together: every step on a CPU; on a GPU, so that it need not be
    waited for in between, every ``log_every_n_steps`` steps and before every checkpoint. A step pays for one small
    copy. With several processes a look costs an all-reduced flag, and all ranks stop together. A checkpoint costs one
    pass over its weights, none of which may be NaN or infinite in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reports: list[_Report] = []

    def report(self, terms: dict[str, Tensor], batch_idx: int) -> None:
        """Log the terms of a training step (numbers) as ``train/*``, and keep them: those of a micro-batch where
        gradients are accumulated."""
        for name, value in terms.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        loader = self.trainer.train_dataloader
        epoch = loader.epoch if isinstance(loader, ResumableLoader) else self.current_epoch
        values = torch.stack([x.detach() for x in terms.values()])
        self._reports.append(_Report(self.global_step, epoch, batch_idx, tuple(terms), values))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the terms if it is time.

        Raises:
            FloatingPointError: with the step, the terms and the names of the samples in the first bad batch.
        """
        trainer: Any = self.trainer
        if self.device.type == "cpu" or self.global_step % max(trainer.log_every_n_steps, 1) == 0:
            self._stop_on_all_ranks(self._first_bad_batch())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what is not finite.

        Raises:
            FloatingPointError: as `on_train_batch_end`; or with the names of the weights.
        """
        # first: another rank's loss has brought this rank's weights down too
        self._stop_on_all_ranks(self._first_bad_batch())
        for weights in (state_of(checkpoint, "raw"), checkpoint["state_dict"]):
            self._stop_on_all_ranks(self._bad_weights(weights))

    def _stop_on_all_ranks(self, reason: str | None) -> None:
        if not self.trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            return
        elsewhere = (
            f"step {self.global_step}, rank {self.global_rank}: another rank found what is not finite and names it"
        )
        raise FloatingPointError(f"{reason or elsewhere}\n{self._rescue()}")

    def _first_bad_batch(self) -> str | None:
        reports, self._reports = self._reports, []
        if not reports:
            return None
        values = iter(torch.cat([report.values for report in reports]).tolist())
        for report in reports:
            terms = {name: next(values) for name in report.names}
            if not all(map(math.isfinite, terms.values())):
                return self._describe(report, terms)
        return None

    def _describe(self, report: _Report, terms: dict[str, float]) -> str:
        loader = self.trainer.train_dataloader
        samples = loader.names(report.epoch, report.batch) if isinstance(loader, ResumableLoader) else []
        text = (
            f"the loss is not finite at step {report.step} (epoch {report.epoch}, batch {report.batch}, rank "
            f"{self.global_rank}): " + ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
        )
        listed = "".join(f"\n  {name}" for name in samples) or " (the data set has no names for them)"
        return f"{text}. The samples of the batch:{listed}"

    def _bad_weights(self, weights: dict[str, Tensor]) -> str | None:
        found = [name for name, x in weights.items() if not _finite(x)]
        if not found:
            return None
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        return (
            f"{len(found)} weights are not finite after step {self.global_step} (rank {self.global_rank}), "
            f"with losses that are: {some}"
        )

    def _rescue(self) -> str:
        own = [getattr(callback, "last_model_path", "") for callback in self.trainer.checkpoint_callbacks]
        last = next((path for path in (*own, self.trainer.ckpt_path) if path and Path(path).exists()), None)
        return "No checkpoint has been written yet" if last is None else f"The last good checkpoint is {last}"


def _finite(x: Any) -> bool:
    if not isinstance(x, Tensor):
        return True
    own = x.to_local() if isinstance(x, DTensor) else x
    return bool(own.isfinite().all()) if own.is_floating_point() else True
