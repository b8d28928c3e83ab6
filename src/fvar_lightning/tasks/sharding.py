"""FSDP2 sharding of student and teacher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR

Networks = tuple[VAR, HighFrequencyTeacher | None]
"""Student and teacher, where there is one."""


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """What the trainer's precision means for shards: with ``bf16-mixed`` float32 weights, which are gathered and
    computed with in bfloat16 and whose gradients are summed in float32.

    Raises:
        ValueError: if the precision is none that can be sharded.
    """
    policies = {
        "32-true": MixedPrecisionPolicy(),
        "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    if precision not in policies:
        raise ValueError(f"precision must be one of {', '.join(policies)} for a sharded model, got {precision!r}")
    return policies[precision]


def blocks(student: VAR, teacher: HighFrequencyTeacher | None) -> list[nn.Module]:
    """All blocks of both."""
    found = [*student.blocks]
    if teacher is not None:
        found += teacher.blocks
        if teacher.network is not None:
            found += teacher.network.blocks
    return found


def shard(student: VAR, teacher: HighFrequencyTeacher | None, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard every block, then what is left of each network, over a one-dimensional mesh; a second call does nothing.

    A block that recomputes does so within its own forward, for which its weights are gathered once, in the backward
    pass too.
    """
    if isinstance(student, FSDPModule):
        return
    for block in blocks(student, teacher):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(student, "trace")
    if teacher is not None:
        fully_shard(teacher, mesh=mesh, mp_policy=policy)


def build_sharded(build: Callable[[], Networks], mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Networks:
    """Networks of which no process ever holds more than its shards and, on the way, one tensor; but the first, which
    builds them on the CPU and hands them out, so that they are what a single process would have built.

    Args:
        build: makes them; of the default device.
        mesh: one-dimensional.
        policy: see `shard`.
    """
    whole = build() if distributed.get_rank() == 0 else (None, None)
    with torch.device("meta"):
        networks = build()
    shard(*networks, mesh, policy)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for network, source in zip(networks, whole, strict=True):
        if network is not None:
            network.to_empty(device=mesh.device_type)
            for part in network.modules():
                if isinstance(part, VAR | HighFrequencyTeacher):
                    part.level_ids = part.layout.level_ids().to(mesh.device_type)
            set_model_state_dict(network, {} if source is None else source.state_dict(), options=options)
    return networks


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Has every rank hold all weights of a network meanwhile: sampling enters it by other ways than `forward`.

    All ranks must enter equally often. Weights that are gathered in less than their own precision compute under
    autocast, as in training. Does nothing for a network that is not sharded.
    """
    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in shards:  # after a pass without gradients some are still gathered, in another precision
        module.reshard()
    kept = next(network.parameters())
    for module in shards:
        module.unshard()
    used = next(network.parameters()).dtype
    try:
        with torch.autocast(kept.device.type, used) if used != kept.dtype else nullcontext():
            yield
    finally:
        for module in shards:
            module.reshard()
