"""What every GPU of a run holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse import Namespace

from fvar_lightning.planning.cost import Cost
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.sharding import blocks


@dataclass(frozen=True)
class Layout:
    """How a run lies on its GPUs."""

    gpus: int
    strategy: Literal["single", "ddp", "fsdp2"]
    half: bool
    """Whether it computes in half precision."""
    buckets: bool = True
    """Whether DistributedDataParallel keeps the gradients a second time (without ``gradient_as_bucket_view``)."""
    averaged: bool = False
    """Whether averaged weights are kept beside the last ones."""


def memory(task: Any, cost: Cost, layout: Layout) -> dict[str, int]:
    """What every GPU holds when it holds most, by part, in bytes.

    Args:
        task: on device meta.
        cost: of its step.
        layout: of the run.
    """
    sharded = layout.strategy == "fsdp2"
    share = layout.gpus if sharded else 1
    trained = sum(p.nbytes for p in task.parameters() if p.requires_grad)
    whole = sum(x.nbytes for x in (*task.parameters(), *task.buffers()))
    held = cost.batch + cost.kept + cost.half_weights
    parts = {
        "weights": trained // share,
        # FSDP2 drops them with the gathered block
        "half-precision weights": 0 if sharded else cost.half_weights,
        "averaged weights": whole if layout.averaged else 0,
        "frozen networks": whole - trained + cost.helpers,
        "gradients": trained // share,
        "gradient buckets": trained if layout.strategy == "ddp" and layout.buckets else 0,
        "optimiser": cost.states // share,
        "gathered blocks": _gathered(task, 2 if layout.half else 4) if sharded else 0,
        "batch": cost.batch,
        "activations": cost.kept,
        "transients": max(cost.peak - held, cost.update // share - (held - cost.batch)),
    }
    return {name: size for name, size in parts.items() if size}


def _gathered(task: Any, weight: int) -> int:
    """Bytes that FSDP2 adds to the shards: the block at work, the next one, and what is in no block; of each the
    weights of so many bytes, and gradients in float32."""
    if not isinstance(task, FVARTask):
        raise ValueError("trainer.strategy ModelParallelStrategy shards FVARTask only; tokenizers are small: take ddp")
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(task.student, task.teacher)]
    rest = sum(p.numel() for p in task.parameters() if p.requires_grad) - sum(sizes)
    return (2 * max(sizes) + rest) * (weight + 4)


GROWING = ("batch", "activations", "transients")
"""Parts of the memory that grow with the batch."""


def largest_batch(total: Callable[[int], int], fixed: int, batch_size: int, available: int) -> int:
    """The most images a GPU has memory for.

    Memory is nearly linear in the batch: the line through two measured batches leads to the next, until it leads to one
    that is within 2 % of one measured.

    Args:
        total: bytes that a batch takes.
        fixed: bytes of these that every batch takes.
        batch_size: a first guess.
        available: bytes.
    """
    images, size = batch_size, total(batch_size)
    slope = (size - fixed) / images
    for _ in range(4):
        found = max(int(images + (available - size) // slope), 0)
        if abs(found - images) <= 0.02 * images:
            break
        measured = max(found, 1)
        change = total(measured) - size
        slope = change / (measured - images) if measured != images else slope
        images, size = measured, size + change
    return found


def layout_of(trainer: Namespace, gpus: int | None, *, half: bool) -> Layout:
    """How the trainer lays a run on its GPUs.

    Args:
        trainer: its options.
        gpus: how many; ``None``: those it names, 8 devices where it leaves them open.
        half: whether it computes in half precision.
    """
    if gpus is None:
        devices = trainer.devices
        count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 8
        gpus = (1 if trainer.accelerator == "cpu" else count) * trainer.num_nodes
    kind, options = trainer.strategy, {}
    if isinstance(kind, Namespace):
        kind, options = kind.class_path, kind.init_args
    sharded = "ModelParallel" in kind
    averaged = any("WeightAveraging" in callback.class_path for callback in trainer.callbacks or ())
    return Layout(
        gpus,
        "fsdp2" if sharded else "ddp" if gpus > 1 else "single",
        half,
        buckets=not options.get("gradient_as_bucket_view", False),
        averaged=averaged,
    )
