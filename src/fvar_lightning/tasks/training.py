"""What both tasks share: reproducible randomness, parameter groups and the learning rate over time."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.weights.averages import holds_both, state_of


def prefix(trainer: Trainer) -> str:
    """Under which figures are logged: ``test`` in a test, ``val`` otherwise."""
    return "test" if trainer.testing else "val"


def batch_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator that depends on the key alone (seed, epoch, batch, rank, ...): a resumed run draws what an
    undisturbed one would."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that `batch_generator` cannot take."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")


def check_views(task: LightningModule, schedule: FocusSchedule, psf: str | None) -> None:
    """Refuse a data module that makes other views than the task's tokenizer encodes; without a psf it encodes none.

    Raises:
        ValueError: with both schedules or point-spread functions.
    """
    data = getattr(task.trainer, "datamodule", None)
    for name, ours in (("schedule", schedule), ("psf", psf)):
        theirs = getattr(data, name, ours)
        if ours not in (theirs, None):
            raise ValueError(f"{name} of the data module and of the tokenizer differ: {theirs} and {ours}")


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with the optimiser's weight decay; biases, gains, embeddings of
    position and level, and attention temperatures without (VAR's rule)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.dim() > 1 and not any(word in name for word in _UNDECAYED)
                (decayed if is_matrix else free).append(parameter)
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


_UNDECAYED = ("pos_", "lvl_embed", "ada_gss", "scale_mul", "alias_positions", "alias_levels", "bias")


def use_right_weights(trainer: Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Have a checkpoint that holds averaged weights too load the right ones: a fit that keeps no averages goes on with
    the last step's; all else takes the averages, where there are any yet. A fit that keeps them takes both by itself.

    For `on_load_checkpoint` of a task, which comes before the weights are loaded.
    """
    if not holds_both(checkpoint):
        return
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        checkpoint["state_dict"] = state_of(checkpoint, "ema")
    elif not any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        checkpoint["state_dict"] = state_of(checkpoint, "raw")


def training_steps(trainer: Trainer) -> int:
    """Optimiser steps of the whole run.

    Raises:
        ValueError: if neither max_steps nor max_epochs bounds them.
    """
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise ValueError("trainer needs max_steps or max_epochs, after which the learning rate has fallen; got neither")
    return int(steps)


def compile_each(modules: Iterable[nn.Module], **options: Any) -> None:
    """`torch.compile` every module by itself when it first runs; takes what that takes.

    Under DDP dynamo would split the graphs at the buckets of gradients, for which these are too small, and thereby
    forget ``dynamic`` and, in older releases, refuse checkpointed activations: for the process this is switched off.
    """
    torch._dynamo.config.optimize_ddp = False
    for module in modules:
        module.compile(**options)


def ramp(passed: float, start: float, length: float, stop: float = 1.0) -> float:
    """0 until the part `start` of a run has passed, then linearly to 1 within the part `length`; 0 from `stop` on."""
    if not start <= passed < stop:
        return 0.0
    return min((passed - start) / length, 1.0) if length > 0 else 1.0


def check_lr_plan(lr_warmup: float, lr_final: float, lr_hold: float = 0.0) -> None:
    """Refuse what is no part of a run, or no rate.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, part in (("lr_warmup", lr_warmup), ("lr_hold", lr_hold)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {part} (a part of the run)")
    if not lr_final >= 0:
        raise ValueError(f"lr_final must not be negative, got {lr_final}")


class WarmupLinear(LambdaLR):
    """Learning rate and weight decay over the steps of a run.

    The rate rises linearly, stays at its peak, then falls linearly: VAR's ``lin0``, but for the rate of the first step,
    which there is 0.005 of the peak. The decay goes from the optimiser's to the final one by half a cosine.

    Args:
        optimizer: whose groups without decay stay without.
        steps: of the run.
        warmup: part of the steps during which the rate rises.
        final: rate at the end over its peak.
        hold: part of the rest during which it stays at its peak.
        weight_decay_final: weight decay at the end; ``None``: the optimiser's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        warmup: float,
        final: float,
        hold: float = 0.0,
        weight_decay_final: float | None = None,
    ) -> None:
        rising = max(round(warmup * steps), 1)
        falling = rising + round(hold * (steps - rising))
        self.last_step, self.weight_decay_final = max(steps - 1, 1), weight_decay_final
        self.weight_decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            rest = (steps - step) / max(steps - falling, 1)
            return final + (1 - final) * min(max(rest, 0.0), 1.0)

        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take from a checkpoint how far the run has come; peak, curve and decay are this run's own."""
        own = ("base_lrs", "last_step", "weight_decay_final", "weight_decays")
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in own})
        rates = [peak * factor(self.last_epoch) for peak, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, peak, rate in zip(self.optimizer.param_groups, self.base_lrs, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        self._last_lr = rates
        self._decay()

    def step(self, epoch: int | None = None) -> None:
        """Go on by a step."""
        super().step(epoch)
        self._decay()

    def _decay(self) -> None:
        passed = (1 - math.cos(math.pi * min(self.last_epoch / self.last_step, 1))) / 2
        for group, first in zip(self.optimizer.param_groups, self.weight_decays, strict=True):
            last = first if self.weight_decay_final is None else self.weight_decay_final
            if first > 0:
                group["weight_decay"] = first + passed * (last - first)
