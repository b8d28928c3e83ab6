"""Losses of tokenizer training."""

import torch.nn.functional as F
from torch import Tensor


def pixel_loss(reconstruction: Tensor, target: Tensor, l1: float, l2: float) -> Tensor:
    """l1 * mean |x - y| + l2 * mean (x - y)^2 over all elements, a scalar."""
    return l1 * F.l1_loss(reconstruction, target) + l2 * F.mse_loss(reconstruction, target)
