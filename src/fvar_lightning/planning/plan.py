"""Plan: what a configuration takes, and how it is told."""

from dataclasses import dataclass

from jsonargparse.typing import PositiveFloat, PositiveInt

from fvar_lightning.cli import configs

GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """What the configuration does not tell of machine and data.

    Args:
        gpus: in all; by default the trainer's devices x num_nodes, 8 devices where it leaves them open.
        memory: of each, in GiB.
        reserve: part of it that goes to CUDA, NCCL and fragmentation.
        tflops: peak of each in the precision of training, 10^12 operations a second; frozen tokenizers, which compute
            in float32, reach half of it (TF32).
        utilisation: part of the peak that is reached.
        images: in an epoch.
        classes: of the images.
        structure: configuration that stands for a structure tokenizer whose checkpoint is not there.
        alias: the same for an alias tokenizer.
    """

    gpus: PositiveInt | None = None
    memory: PositiveFloat = 80.0
    reserve: PositiveFloat = 0.1
    tflops: PositiveFloat = 312.0
    utilisation: PositiveFloat = 0.4
    images: PositiveInt = 1_281_167
    classes: PositiveInt = 1000
    structure: str = str(configs() / "tokenizer" / "structure_base.yaml")
    alias: str = str(configs() / "tokenizer" / "alias_base.yaml")


@dataclass(frozen=True)
class Plan:
    """What a configuration takes. Operations are multiplications and additions; memory is in bytes, of one GPU."""

    name: str
    parameters: dict[str, int]
    tokens: int
    """Of an image."""
    precision: str
    strategy: str
    gpus: int
    batch_size: int
    accumulate: int
    steps: int
    flops: float
    """Of an image, forward and backward."""
    frozen_flops: float
    """Of an image, in frozen tokenizers."""
    memory: dict[str, int]
    available: int
    largest_batch: int
    """Images a GPU."""
    seconds: float
    """Of the whole run, its validation and evaluation not counted."""
    notes: list[str]

    @property
    def global_batch(self) -> int:
        """Images in a step of the optimiser."""
        return self.gpus * self.batch_size * self.accumulate

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return sum(self.memory.values()) <= self.available


def text(plan: Plan, assumed: Assumptions) -> str:
    """The plan for a terminal."""
    full = plan.available / GIB / (1 - assumed.reserve)
    used = sum(plan.memory.values())
    images = plan.global_batch * plan.steps
    kind = {"single": "one GPU", "ddp": f"{plan.gpus} GPUs, DDP", "fsdp2": f"{plan.gpus} GPUs, FSDP2"}[plan.strategy]
    frozen = f" and {plan.frozen_flops / 1e12:.3g} in frozen tokenizers" if plan.frozen_flops else ""
    run = plan.steps * plan.global_batch * (plan.flops + plan.frozen_flops)
    lines = [
        f"{plan.name}: {plan.precision}, {kind}",
        *(f"  {note}" for note in plan.notes),
        "",
        "parameters, millions",
        *(f"  {name:24}{count / 1e6:12.1f}" for name, count in plan.parameters.items()),
        "",
        f"{plan.tokens} tokens an image; TFLOP an image: {plan.flops / 1e12:.3g}{frozen}",
        f"{plan.steps} steps of {plan.global_batch} images ({plan.batch_size} a GPU"
        f"{f' x {plan.accumulate}' if plan.accumulate > 1 else ''}): {images / 1e6:.4g} million images, {run:.3g} FLOP",
        "",
        f"memory of a GPU, GiB, at {plan.batch_size} images",
        *(f"  {name:24}{size / GIB:12.2f}" for name, size in plan.memory.items()),
        f"  {'together':24}{used / GIB:12.2f}",
        f"  {'there':24}{plan.available / GIB:12.2f}   {full:g} less {assumed.reserve:.0%} in reserve",
        f"  {'fits' if plan.fits else 'does not fit'}; the largest batch that does: {plan.largest_batch}",
        "",
        f"{duration(plan.seconds)} at {assumed.utilisation:.0%} of {plan.gpus} x {assumed.tflops:g} TFLOP/s",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In days, hours or minutes."""
    unit, name = next(((n, name) for n, name in ((86400, "days"), (3600, "hours")) if seconds >= n), (60, "minutes"))
    return f"{seconds / unit:.3g} {name}"
