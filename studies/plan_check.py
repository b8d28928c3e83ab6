"""What `fvar plan` counts beside what steps on this CPU do, at sizes that fit it: the second table of docs/scaling.md.

    python studies/plan_check.py

Work by torch's FLOP counter over forward and backward, kept bytes by autograd's hooks for saved tensors, states by the
optimiser after a step; all in float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fvar_lightning.activations import saved_bytes
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.planning.cost import step_cost
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask

SMALL, FULL = FocusSchedule((1, 2, 3, 4, 6, 8), patch_size=8, max_radius=5.0), FocusSchedule()
STRUCTURE = {"vocab_size": 512, "z_channels": 16, "ch": 16, "ch_mult": [1, 1, 2, 4], "norm_groups": 4}
STRUCTURE_16 = STRUCTURE | {"ch_mult": [1, 1, 2, 2, 4]}
ALIAS = {"vocab_size": 512, "ch": 128}


def stage_2(schedule: FocusSchedule, structure: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Arguments of a task with described tokenizers."""
    return {
        "structure_tokenizer": {"kind": "structure", "schedule": schedule, **structure},
        "alias_tokenizer": {"kind": "alias", "schedule": schedule, **ALIAS},
        "num_classes": 10,
        **options,
    }


CASES: dict[str, tuple[type, dict[str, Any], FocusSchedule, int]] = {
    "structure tokenizer, 64 px": (TokenizerTask, {"schedule": SMALL, **STRUCTURE}, SMALL, 16),
    "alias tokenizer, 64 px": (AliasTokenizerTask, {"schedule": SMALL, **ALIAS}, SMALL, 16),
    "stage 2, depth 6, 64 px": (FVARTask, stage_2(SMALL, STRUCTURE, depth=6, width=192, heads=6), SMALL, 16),
    "the same, recomputed": (
        FVARTask, stage_2(SMALL, STRUCTURE, depth=6, width=192, heads=6, recompute=True), SMALL, 16
    ),
    "stage 2, depth 8, 256 px": (FVARTask, stage_2(FULL, STRUCTURE_16, depth=8), FULL, 2),
}  # fmt: skip
"""Task, its arguments, the schedule of its images and how many of them."""


def measured(task: Any, batch: Any) -> tuple[int, int, int]:
    """Operations of a step, bytes kept for its backward pass, and bytes of the optimiser's states."""

    def loss() -> torch.Tensor:
        inputs = task.tokens(batch) if isinstance(task, FVARTask) else batch
        return task.losses(inputs, torch.Generator().manual_seed(0))["loss"]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    kept = saved_bytes(loss, task)
    optimizer = task.optimizer_factory(task.parameters_to_train())
    optimizer.step()
    states = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    return counter.get_total_flops(), kept, states


def main() -> None:
    """Print the table."""
    print("| step | GFLOP, planned | counted | kept, planned | held | optimiser, planned | held |")
    print("|---|---|---|---|---|---|---|")
    for name, (kind, arguments, schedule, images) in CASES.items():
        data = ImageDataModule(image_size=schedule.image_size, schedule=schedule)
        with torch.device("meta"):
            planned = step_cost(kind(**arguments), data, images, None)
        torch.manual_seed(0)
        task = kind(**arguments)
        codebook = task.vae.codebook if isinstance(task, FVARTask) else task.tokenizer.codebook
        codebook.updates.fill_(2**40)  # its codes count as set
        pixels = torch.randint(256, (images, 3, schedule.image_size, schedule.image_size), dtype=torch.uint8)
        flops, kept, states = measured(task, data.on_after_batch_transfer([pixels, torch.arange(images) % 10], 0))
        cells = [f"{x / 1e9:.1f}" for x in (planned.flops + planned.frozen_flops, flops)]
        cells += [f"{x / 2**20:.1f} MiB" for x in (planned.kept, kept, planned.states, states)]
        print(f"| {' | '.join([name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
