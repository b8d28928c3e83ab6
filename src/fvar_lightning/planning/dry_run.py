"""Passes over tensors without memory (device meta), counting the work and the memory they would take on a GPU."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts floating-point operations and the bytes of what is made and not yet freed, tensors on meta alone.

    A multiplication and an addition are two operations; only matrix products, convolutions and attention count.

    Args:
        own: tensors that were there before, and are not counted.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.live = 0
        """Bytes now."""
        self.peak = 0
        """Bytes at most."""
        self.found = 0
        """Bytes of tensors that were there before without being among `own`: frozen networks."""
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in self._new(args):
            self.found += storage.nbytes()
        result = func(*args, **kwargs)
        for storage in self._new(result if isinstance(result, tuple | list) else (result,)):
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _new(self, values: Iterable[Any]) -> Iterable[torch.UntypedStorage]:
        """Storages on meta that have not been seen before."""
        for value in values:
            if isinstance(value, list):
                yield from self._new(value)
            elif isinstance(value, Tensor) and value.is_meta:
                storage = value.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    yield storage

    def _free(self, size: int) -> None:
        self.live -= size


class LikeCUDA(TorchFunctionMode):
    """Tensors on meta compute as on a GPU: in half precision where `torch.autocast("cpu")` is on, but by the rules of
    CUDA, which differ; and with fused attention.

    The rules are those of the functions that this library calls. Fused attention keeps queries, keys, values, its
    output and a log-sum-exp for each query; which kernel a GPU takes does not matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, Tensor] | None = {}

    def forget_weights(self) -> int:
        """Drop the half-precision weights, as autocast does at its end, and those of later passes at once.

        Returns:
            Bytes of those that the backward pass keeps.
        """
        kept = weakref.WeakSet(weight.untyped_storage() for weight in (self._cast or {}).values())
        self._cast = None
        return sum(storage.nbytes() for storage in kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in HALF:
                args = [self._half(value) for value in args]
                kwargs = {name: self._half(value) for name, value in kwargs.items()}
            elif func in FULL:
                args = [_full(value) for value in args]
            elif func is F.normalize:
                return _normalize(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **kwargs)[0]
        return func(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        if not _is_half_to_be(value):
            return value
        dtype = torch.get_autocast_dtype("cpu")
        if self._cast is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        # autocast casts a weight once in a pass
        return self._cast.setdefault(id(value), value.to(dtype))


HALF = {
    F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention,
    torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip
"""Computed in half precision under autocast."""
FULL = {
    F.layer_norm, F.group_norm, F.interpolate, F.mse_loss, F.l1_loss, F.nll_loss, F.kl_div,
    torch.exp, Tensor.exp, torch.square, Tensor.square, torch.pow, Tensor.pow, Tensor.__pow__,
}  # fmt: skip
"""Computed in float32 under CUDA's autocast."""


def _is_half_to_be(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.is_meta


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """F.normalize, whose norm alone asks for float32."""
    return x / x.norm(p, dim, keepdim=True, dtype=torch.float32).clamp_min(eps).expand_as(x)


def backward(loss: Tensor) -> None:
    """loss.backward(), which itself would leave `LikeCUDA` before it computes again what was not kept."""
    run = torch.autograd.Variable._execution_engine.run_backward
    run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
