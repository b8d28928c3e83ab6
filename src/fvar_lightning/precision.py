"""Half precision: where it would change tokens, and which processors compute in it."""

from pathlib import Path

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which operations on the tensor's device keep the precision of their arguments.

    Tensors without memory (device meta) follow the CPU's autocast.
    """
    device = tensor.device.type
    return torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False)


def lacks_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor is known to have no units for bfloat16, which is then no faster than float32.

    Args:
        cpuinfo: where Linux tells; elsewhere nothing is known.
    """
    path = Path(cpuinfo)
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((set(line.split()) for line in lines if line.lower().startswith(("flags", "features"))), None)
    return flags is not None and not flags & {"avx512_bf16", "amx_bf16", "bf16"}
