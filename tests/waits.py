"""What a CPU can tell of waiting for a GPU."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or its size, the host would have to wait for."""

    NAMES = ("local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "lift_fresh")
    """The last: a tensor made of Python numbers, which are copied to the device and waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        # a boolean mask as an index is a nonzero
        masks = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for part in args
            if isinstance(part, list)
            for x in part
        )
        if masks or any(name.startswith((known, f"_{known}")) for known in self.NAMES):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """Lists every operation with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found.append((func.name(), [x.shape for x in (*args, result) if isinstance(x, torch.Tensor)]))
        return result
