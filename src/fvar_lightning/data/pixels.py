"""Images in [-1, 1] and their uint8 pixels, back and forth."""

import torch
from torch import Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded as a PNG stores them (truncation would darken by half a level)."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
