"""Tasks that nobody deploys: they tell what of a teacher's help is owed to the alias tokens."""

import copy
from typing import Any

import torch
from torch import Tensor

from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.tasks.fvar import FVARTask, StepInputs
from fvar_lightning.tasks.sharding import Networks
from fvar_lightning.transformer.losses import feature_loss, token_losses

DECAY = 0.99
"""Of the average a step, once it has seen enough of them."""


class ShuffledAlias(FVARTask):
    """A teacher that reads the alias tokens of another image of the batch: all of FVAR but the information."""

    def step_inputs(
        self, batch: TokenBatch, generator: torch.Generator | None = None, distillation: float = 1.0
    ) -> StepInputs:
        step = super().step_inputs(batch, generator, distillation)
        assert step.alias is not None
        return step._replace(alias=step.alias.roll(1, dims=0))


class SelfDistilled(FVARTask):
    """A teacher that is a moving average of the student, and reads no alias tokens."""

    def _networks(self) -> Networks:
        """The student begins as it does beside a teacher."""
        student, _ = super()._networks()
        self.average = copy.deepcopy(student).requires_grad_(False)
        return student, None

    def terms(self, step: StepInputs) -> dict[str, Tensor]:
        trace = self.student.trace(step.labels, step.inputs, step.keep)
        readout = self.student.readout(trace.hidden[-1], trace.condition)
        with torch.no_grad():
            taught = self.average.trace(step.labels, step.inputs)
            known = self.average.readout(taught.hidden[-1], taught.condition)
        terms = dict(zip(("student", "teacher", "logit"), token_losses(step.targets, readout, known), strict=True))
        n = self.feature_blocks
        terms["feature"] = feature_loss(trace.hidden[-n:], taught.hidden[-n:])
        distilled = self.feature_weight * terms["feature"] + self.logit_weight * terms["logit"]
        terms["loss"] = terms["student"] + step.distillation * distilled
        return terms

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.follow(min(DECAY, (1 + self.global_step) / (10 + self.global_step)))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Have the average keep so much of itself."""
        for average, own in zip(self.average.parameters(), self.student.parameters(), strict=True):
            average.lerp_(own, 1 - decay)
