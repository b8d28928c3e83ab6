"""Refocus: from an image to the three views of every scale (paper section 3.2, eq. 3-4).

Legend: B batch, S scales, K focus states, h_s side of the view of scale s in pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fvar_lightning.optics.psf import make_psf
from fvar_lightning.schedule import FocusSchedule


class Views(NamedTuple):
    """What the optics make of a batch: lists of S tensors, the s-th (B, 3, h_s, h_s)."""

    focused: list[Tensor]
    """L: blurred to the focus state of the scale, then decimated."""
    downsampled: list[Tensor]
    """D: decimated as it is, so that fine detail folds into false coarse detail."""
    alias: list[Tensor]
    """A = D - L."""


def decimate(images: Tensor, size: int) -> Tensor:
    """The arrow-down of eq. 3-4: (B, C, H, H) -> (B, C, size, size), size <= H, without any prefilter.

    Samples at the centres of the coarse pixels, linearly interpolated where they fall between fine ones: the result of
    `F.interpolate(mode="bilinear", align_corners=False, antialias=False)`.
    """
    side = images.shape[-1]
    if size == side:
        return images
    # Positions are fractions of 2 * size: exact in integers, where float32 would be off by up to 1e-5 pixels
    numerator = (2 * torch.arange(size, device=images.device) + 1) * side - size
    lower = numerator // (2 * size)
    weight = (numerator % (2 * size)).to(images.dtype) / (2 * size)
    upper = (lower + 1).clamp(max=side - 1)
    rows = torch.lerp(images.index_select(-2, lower), images.index_select(-2, upper), weight[:, None])
    return torch.lerp(rows.index_select(-1, lower), rows.index_select(-1, upper), weight)


class Refocus(nn.Module):
    """Refocused views of a batch of images, on the device and in the dtype of the images.

    Each focus state is one product with the spectrum of its point-spread function: one Fourier transform of the
    reflected image serves all states, one inverse transform each state, and all its scales sample the same result.
    Nothing here is random: noise on the tokenizer's input (beta_k in the paper) belongs to the tokenizer's training.

    Args:
        schedule: scales, focus states and radii.
        psf: name of a point-spread function (`disk`, `gaussian`, `polygon`, `lanczos`, `none`), or a function like
            `disk_psf` that takes a radius and a `dtype`.

    Raises:
        ValueError: if there is no such function, or a kernel reaches further than the image can be reflected.
    """

    def __init__(self, schedule: FocusSchedule, psf: str | Callable[..., Tensor] = "disk") -> None:
        super().__init__()
        self.schedule = schedule
        kernels = [
            psf(r, dtype=torch.float64) if callable(psf) else make_psf(psf, r, dtype=torch.float64)
            for r in schedule.state_radii
        ]
        self.margin = max(kernel.shape[-1] // 2 for kernel in kernels)
        if self.margin >= schedule.image_size:
            raise ValueError(
                f"psf {psf!r} at radius {max(schedule.state_radii)} reaches {self.margin} px, "
                f"which must be less than the image side of {schedule.image_size} px"
            )
        self.side = schedule.image_size + 2 * self.margin
        self.spectra = [self._spectrum(kernel) if kernel.shape[-1] > 1 else None for kernel in kernels]

    def _spectrum(self, kernel: Tensor) -> Tensor:
        half = kernel.shape[-1] // 2
        room = self.side - kernel.shape[-1]
        centred = F.pad(kernel, (0, room, 0, room)).roll((-half, -half), (0, 1))
        return torch.fft.rfft2(centred)

    def forward(self, images: Tensor) -> Views:
        """Views of images (B, C, H, W) in [-1, 1], H = W = the schedule's image size.

        Raises:
            ValueError: if the images have another size.
        """
        return self.views(images, self.blur(images))

    def views(self, images: Tensor, blurred: Sequence[Tensor]) -> Views:
        """As `forward`, for somebody who also keeps the K full-size states `blur(images)`."""
        pairs = list(zip(self.schedule.states, self.schedule.view_sizes, strict=True))
        focused = [decimate(blurred[state], size) for state, size in pairs]
        downsampled = [decimate(images, size) for _, size in pairs]
        alias = [d - f for d, f in zip(downsampled, focused, strict=True)]
        return Views(focused, downsampled, alias)

    def blur(self, images: Tensor) -> list[Tensor]:
        """The K focus states at full size, each (B, C, H, W); sharp ones are the images themselves.

        Raises:
            ValueError: if the images have another size than the schedule's.
        """
        size = self.schedule.image_size
        if images.ndim != 4 or images.shape[-2:] != (size, size):
            raise ValueError(f"images must measure (B, C, {size}, {size}) for this schedule, got {tuple(images.shape)}")
        m = self.margin
        work = images if images.dtype == torch.float64 else images.float()
        spectrum = torch.fft.rfft2(F.pad(work, (m, m, m, m), mode="reflect"))
        states = []
        for transfer in self.spectra:
            if transfer is None:
                states.append(images)
            else:
                blurred = torch.fft.irfft2(spectrum * transfer.to(spectrum), s=(self.side, self.side))
                states.append(blurred[..., m : m + size, m : m + size].to(images.dtype))
        return states
