"""FSDP2 sharding of student and teacher."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR


def shard(student: VAR, teacher: HighFrequencyTeacher | None, mesh: DeviceMesh) -> None:
    """Shard every block, then what is left of each network, over a one-dimensional mesh; a second call does nothing."""
    if isinstance(student, FSDPModule):
        return
    blocks = [*student.blocks, *(teacher.blocks if teacher is not None else ())]
    if teacher is not None and teacher.network is not None:
        blocks += teacher.network.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "trace")
    if teacher is not None:
        fully_shard(teacher, mesh=mesh)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Has every rank hold all weights of a network meanwhile: sampling enters it by other ways than `forward`.

    All ranks must enter equally often. Does nothing for a network that is not sharded.
    """
    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
