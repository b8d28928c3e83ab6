"""RemainingTime: how long all stages of a quickstart will still take."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

MEASURED = 0.02
"""Part of all work from which on the measured pace counts."""


class RemainingTime(Callback):
    """Shows the ``minutes_left`` of all stages in the progress bar of each that trains.

    A stage takes what is expected of it, at the pace of the steps so far. The same callback must serve all stages.

    Args:
        expected: seconds of every stage, in order; once some work is done only their ratios count.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        self.expected = dict(expected)
        self.ahead = dict(expected)
        """Seconds expected of the stages that have not begun."""
        self.worked = self.spent = 0.0
        """Seconds that were expected of the steps so far, and seconds these took."""
        self.stage = ""

    def begin(self, stage: str) -> str:
        """Of `expected`; returns how long all stages from this one on will take, in words."""
        seconds = self._left(self.worked, self.spent)
        self.stage = stage
        self.ahead = dict(list(self.expected.items())[list(self.expected).index(stage) + 1 :])
        return words(seconds)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed stage has steps behind it."""
        self.first, self.started = trainer.global_step, perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log it."""
        worked, spent = self._so_far(trainer)
        stage = self.expected[self.stage] * (1 - trainer.global_step / trainer.max_steps)
        pl_module.log("minutes_left", self._left(worked, spent, stage) / 60, prog_bar=True, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The stage counts as measured."""
        self.worked, self.spent = self._so_far(trainer)

    def _so_far(self, trainer: Trainer) -> tuple[float, float]:
        part = (trainer.global_step - self.first) / trainer.max_steps
        return self.worked + part * self.expected[self.stage], self.spent + perf_counter() - self.started

    def _left(self, worked: float, spent: float, stage: float = 0.0) -> float:
        """Seconds of the stages ahead, and of the running one of which `stage` were expected."""
        known = worked > MEASURED * sum(self.expected.values())
        return (stage + sum(self.ahead.values())) * (spent / worked if known else 1.0)


def words(seconds: float) -> str:
    """A duration for people."""
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
