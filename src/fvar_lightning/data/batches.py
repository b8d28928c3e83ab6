"""What a data module hands a task. Named tuples: the device transfer of Lightning refuses frozen dataclasses."""

from typing import NamedTuple

import torch
from torch import Tensor

from fvar_lightning.optics.refocus import Views


class ImageBatch(NamedTuple):
    """Images and everything the optics make of them, on the training device."""

    images: Tensor
    """(B, 3, H, W) float32 in [-1, 1]."""
    labels: Tensor
    """(B,) int64."""
    views: Views
    """L, D and A of every scale at the pixel size of the scale."""
    blurred: list[Tensor]
    """The K focus states at full size, sharpest last, each (B, 3, H, W)."""


def in_precision(batch: ImageBatch, dtype: torch.dtype) -> ImageBatch:
    """The batch with all its pictures in `dtype`."""
    if batch.images.dtype == dtype:
        return batch
    views = Views(*([view.to(dtype) for view in kind] for kind in batch.views))
    return ImageBatch(batch.images.to(dtype), batch.labels, views, [state.to(dtype) for state in batch.blurred])


class TokenBatch(NamedTuple):
    """Cached tokens of a batch (`TokenDataModule`)."""

    structure: list[Tensor]
    """S tensors (B, pn_s^2), int64."""
    alias: list[Tensor]
    """S tensors (B, pn_s^2), int64; empty if the cache holds none."""
    labels: Tensor
    """(B,) int64."""


class SampleBatch(NamedTuple):
    """Images that are to be generated."""

    labels: Tensor
    """(B,) int64."""
    seeds: Tensor
    """(B,) int64, one per image."""
