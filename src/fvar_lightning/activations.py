"""What a forward pass keeps for its backward pass: how to keep less, and how to count it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """function(*args, **kwargs), of which only the tensors among `args` are kept for the backward pass.

    That pass calls it again, up to the last tensor it needs: a linear layer at the end does not run twice. The function
    must draw no random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def saved_bytes(forward: Callable[[], Any], *networks: nn.Module) -> int:
    """How many bytes autograd keeps for the backward pass of `forward`.

    Storages count once and whole, however many views of them are kept. Fake tensors (`FakeTensorMode`) are counted as
    real ones are, but take no memory. Nothing that lives only during the passes is counted.

    Args:
        forward: runs the pass; what it returns is dropped.
        networks: whose parameters and buffers are not counted.
    """
    own = {_address(tensor) for network in networks for tensor in (*network.parameters(), *network.buffers())}
    # held until they are counted, so that no address comes twice
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def _address(tensor: Tensor) -> int:
    # data_ptr() is 0 for tensors without memory
    return tensor.untyped_storage()._cdata
