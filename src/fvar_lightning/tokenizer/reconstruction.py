"""Reconstruction: what a training pass of either tokenizer gives."""

from typing import NamedTuple

from torch import Tensor


class Reconstruction(NamedTuple):
    """A batch encoded, quantised and decoded: n = 1 image (structure), or the residuals of n scales (alias)."""

    decoded: list[Tensor]
    """n tensors (B, 3, h, w)."""
    targets: list[Tensor]
    """What they should be, of the same shapes."""
    indices: list[Tensor]
    """Token maps, (B, pn_s^2) int64 each; empty while the codebook warms up."""
    loss: Tensor
    """Codebook and commitment loss, a scalar."""
