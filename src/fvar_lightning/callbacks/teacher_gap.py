"""TeacherGap: what the teacher knows that the student does not, scale by scale, and whether the alias tokens tell it.

Legend: B batch, S scales, L tokens of all scales.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fvar_lightning.atomic import replacing
from fvar_lightning.callbacks.loggers import log_pictures
from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.metrics.pictures import line_chart
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.training import prefix
from fvar_lightning.transformer.losses import token_cross_entropy
from fvar_lightning.transformer.teacher import HighFrequencyTeacher

SUMS = ("tokens", "student", "teacher", "gate", "shuffled_tokens", "shuffled_student", "shuffled")
"""Of every scale: tokens, and over them the cross-entropies and the mean gate; and what belongs to the control."""


class TeacherGap(Callback):
    """Whether the teacher teaches: how much better than the student it predicts held-out tokens, scale by scale.

    In every validation and test, under ``val/`` or ``test/``, each with ``/all`` and ``/1x1``, ``/2x2``, ...:

    - ``teacher_gap``: cross-entropy of the student less that of the teacher, in nats a token
    - ``teacher_gap_shuffled``: the same with the alias tokens of another image of the batch, mostly one of another
      class: what the teacher has ahead of the student without knowing the image's alias, less what wrong alias tokens
      cost it. Only what the gap lies above it is owed to the alias tokens
    - ``teacher_gate``: mean of the gate alpha of eq. 10 over alias blocks and channels; 0 where a scale reads none

    Beside the loggers' pictures of them, the last figures are in ``teacher_gap.csv`` in the logger's folder. It takes
    one more pass of the student and two of the teacher for every batch, and no logits but those of a chunk.

    Args:
        max_batches: only the first so many batches of the loop, on every rank; ``None``: all.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(self, max_batches: int | None = None) -> None:
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {max_batches}")
        self.max_batches = max_batches
        self.sums: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what has no teacher."""
        if not isinstance(pl_module, FVARTask):
            raise ValueError(f"TeacherGap needs a FVARTask, got {type(pl_module).__name__}")
        if pl_module.teacher_loss_weight == 0:
            raise ValueError("TeacherGap needs a teacher: teacher_loss_weight must be positive, got 0")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the sums of a batch."""
        if trainer.sanity_checking or (self.max_batches is not None and batch_idx >= self.max_batches):
            return
        assert isinstance(pl_module, FVARTask)
        with trainer.precision_plugin.forward_context():
            sums = gap_sums(pl_module, pl_module.tokens(batch))
        self.sums = sums if self.sums is None else self.sums + sums

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the figures of all batches, and begin anew."""
        if trainer.sanity_checking or self.sums is None:
            return
        assert isinstance(pl_module, FVARTask)
        sums, self.sums = trainer.strategy.reduce(self.sums, reduce_op="sum"), None
        assert isinstance(sums, Tensor)
        rows = gap_rows(sums.cpu(), pl_module.vae.schedule.patch_nums)
        part = prefix(trainer)
        values = {f"{part}/{figure}/{row['scale']}": row[figure] for row in rows for figure in FIGURES}
        pl_module.log_dict(values, sync_dist=True, batch_size=1)
        log_pictures(trainer, {"teacher_gap": gap_picture(rows[:-1])})
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if trainer.is_global_zero:
            with replacing(folder / "teacher_gap.csv") as beside, beside.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


FIGURES = ("teacher_gap", "teacher_gap_shuffled", "teacher_gate")


@torch.no_grad()
def gap_sums(task: FVARTask, batch: TokenBatch) -> Tensor:
    """What `SUMS` names, of a batch: (7, S) float64.

    The control takes every image's alias tokens from the image before it; a batch of one image has none.
    """
    labels, inputs, targets, alias, *_ = task.step_inputs(batch)
    assert task.teacher is not None
    assert alias is not None
    levels, scales = task.student.level_ids, task.student.layout.num_scales

    def by_scale(values: Tensor) -> Tensor:
        """(B, L) -> sums over the tokens of every scale, (S,)."""
        return values.new_zeros(scales, dtype=torch.float64).index_add(0, levels, values.double().sum(0))

    # hooks are of no effect in what was compiled
    with torch.compiler.set_stance("force_eager") if task.compile_blocks else nullcontext():
        trace = task.student.trace(labels, inputs)
        student = by_scale(token_cross_entropy(targets, task.student.readout(trace.hidden[-1], trace.condition)))
        with mean_gates(task.teacher) as gates:
            taught = task.teacher(task.student, trace, labels, inputs, alias)
        teacher = by_scale(token_cross_entropy(targets, taught.readout))
        wrong = task.teacher(task.student, trace, labels, inputs, alias.roll(1, dims=0))
        shuffled = by_scale(token_cross_entropy(targets, wrong.readout))
    tokens = by_scale(torch.ones_like(targets))
    control = torch.stack((tokens, student, shuffled)) * (len(labels) > 1)
    return torch.cat((torch.stack((tokens, student, teacher, by_scale(torch.stack(gates).mean(0)))), control))


@contextmanager
def mean_gates(teacher: HighFrequencyTeacher) -> Iterator[list[Tensor]]:
    """Collects the gates of passes made meanwhile: of every alias block their mean over channels, (B, L), 0 for tokens
    that read no alias."""
    gates: list[Tensor] = []
    first, last = teacher.reads[0].tokens.start, teacher.reads[-1].tokens.stop

    def collect(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        gate = output.new_zeros(len(output), teacher.layout.length, dtype=torch.float32)
        gate[:, first:last] = output.float().sigmoid().mean(-1)
        gates.append(gate)

    hooks = [block.cross.gate.register_forward_hook(collect) for block in teacher.blocks]  # type: ignore[union-attr]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def gap_rows(sums: Tensor, patch_nums: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for every scale and one for all, from sums (7, S): cross-entropies and gaps in nats a token."""
    names = [*(f"{n}x{n}" for n in patch_nums), "all"]
    rows = []
    for name, column in zip(names, torch.cat((sums, sums.sum(1, keepdim=True)), dim=1).T, strict=True):
        of = dict(zip(SUMS, column, strict=True))
        figures = {
            "student": of["student"] / of["tokens"],
            "teacher": of["teacher"] / of["tokens"],
            "teacher_gap": (of["student"] - of["teacher"]) / of["tokens"],
            "teacher_gap_shuffled": (of["shuffled_student"] - of["shuffled"]) / of["shuffled_tokens"],
            "teacher_gate": of["gate"] / of["tokens"],
        }
        rows.append({"scale": name} | {figure: float(value) for figure, value in figures.items()})
    return rows


def gap_picture(rows: list[dict[str, Any]]) -> Any:
    """Gap and control, and the gate, over the scales."""

    def curve(figure: str) -> list[tuple[float, float]]:
        return [(s + 1, row[figure]) for s, row in enumerate(rows)]

    gaps = {"teacher": curve("teacher_gap"), "alias shuffled": curve("teacher_gap_shuffled")}
    return line_chart({"Teacher's gap, nats a token": gaps, "Mean gate": {"alpha": curve("teacher_gate")}}, "scale")
