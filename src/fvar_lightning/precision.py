"""no_autocast(): where half precision would change tokens."""

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which operations on the tensor's device keep the precision of their arguments.

    Tensors without memory (device meta) follow the CPU's autocast.
    """
    device = tensor.device.type
    return torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False)
