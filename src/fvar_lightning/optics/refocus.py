"""Refocus: from an image to the three views of every scale (paper section 3.2, eq. 3-4).

Legend: B batch, C colour channels, S scales, K focus states, h_s side of the view of scale s in pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fvar_lightning.optics.psf import make_psf
from fvar_lightning.schedule import FocusSchedule


class Views(NamedTuple):
    """What the optics make of a batch: lists of S tensors, the s-th (B, C, h_s, h_s)."""

    focused: list[Tensor]
    """L: blurred to the focus state of the scale, then decimated."""
    downsampled: list[Tensor]
    """D: decimated as it is, so that fine detail folds into false coarse detail."""
    alias: list[Tensor]
    """A = D - L."""


def decimate(images: Tensor, size: int) -> Tensor:
    """The arrow-down of eq. 3-4: (B, C, H, H) -> (B, C, size, size), without any prefilter.

    Samples at the centres of the coarse pixels, linearly interpolated where they fall between fine ones: what
    `F.interpolate(mode="bilinear", align_corners=False, antialias=False)` computes, but at exact positions. There they
    are float32, which costs up to 1e-4 on images of full contrast at 256 px; here rounding costs 1e-6.
    Decimating to its own side returns the image itself.

    Raises:
        ValueError: if the images are not square, or size is not in 1..H.
    """
    side = images.shape[-1]
    if images.shape[-2] != side or not 1 <= size <= side:
        raise ValueError(f"size must lie in 1..H of square images (B, C, H, H), got {size} for {tuple(images.shape)}")
    if size == side:
        return images
    if side % size == 0:  # strided slices, three times faster than indices
        step = side // size
        first = (step - 1) // 2
        if step % 2:
            return images[..., first::step, first::step].contiguous()
        rows = torch.lerp(images[..., first::step, :], images[..., first + 1 :: step, :], 0.5)
        return torch.lerp(rows[..., first::step], rows[..., first + 1 :: step], 0.5)
    # The centres (j + 1/2) side / size - 1/2 in units of 1 / (2 size)
    centres = (2 * torch.arange(size, device=images.device) + 1) * side - size
    lower = centres // (2 * size)
    upper = (lower + 1).clamp(max=side - 1)
    weight = (centres % (2 * size)).to(images.dtype) / (2 * size)
    rows = images.index_select(-2, lower).lerp_(images.index_select(-2, upper), weight[:, None])
    along = (*rows.shape[:-1], size)
    return rows.gather(-1, lower.expand(along)).lerp_(rows.gather(-1, upper.expand(along)), weight)


class Refocus(nn.Module):
    """The views of a batch of images: `Refocus(schedule)(images)`, on the device and in the dtype of the images.

    Blurs in the Fourier domain. One transform of the reflected image serves all focus states, an inverse transform
    each one of them, and a state's scales all sample the same result: the cost depends on neither the radius nor, much,
    the number of scales, and float32 stays float32 where convolutions may be rounded to TF32. Half precision is
    transformed in float32. Differentiable in the images.

    Nothing here is random: the noise on the tokenizer's input (beta_k of the paper) belongs to its training.

    Args:
        schedule: scales, focus states and radii.
        psf: name of a point-spread function (`disk`, `gaussian`, `polygon`, `lanczos`, `none`), or a function that
            takes a radius and a `dtype` as `disk_psf` does.

    Raises:
        ValueError: if there is no such function, or its kernel reaches further than the image can be reflected.
    """

    def __init__(self, schedule: FocusSchedule, psf: str | Callable[..., Tensor] = "disk") -> None:
        super().__init__()
        self.schedule = schedule
        kernels = [
            make_psf(psf, r, dtype=torch.float64) if isinstance(psf, str) else psf(r, dtype=torch.float64)
            for r in schedule.state_radii
        ]
        self._margin = max(kernel.shape[-1] // 2 for kernel in kernels)
        if self._margin >= schedule.image_size:
            raise ValueError(
                f"psf {psf!r} reaches {self._margin} px at radius {max(schedule.state_radii)}; "
                f"images of {schedule.image_size} px can be reflected for {schedule.image_size - 1} px at most"
            )
        side = _fast_length(schedule.image_size + 2 * self._margin)
        self._shape = (side, side)
        self._transfer = [None if kernel.numel() == 1 else _spectrum(kernel, side) for kernel in kernels]
        # Not buffers: half-precision modules would round them, and they must follow the images, not the module
        self._transfer_on: dict[tuple[torch.device, torch.dtype], list[Tensor | None]] = {}

    @property
    def sharp_scales(self) -> int:
        """How many scales, the last ones, are not blurred: their alias residual is zero. A disk within a pixel blurs
        nothing either."""
        return sum(self._transfer[state] is None for state in self.schedule.states)

    def forward(self, images: Tensor) -> Views:
        """The views of images (B, C, H, W) in [-1, 1], H = W = the schedule's image size.

        Sharp views at full size are the images themselves, not copies.

        Raises:
            ValueError: if the images have another size.
        """
        return self.views(images, self.blur(images))

    def views(self, images: Tensor, blurred: Sequence[Tensor]) -> Views:
        """As `forward`, where the K states `blurred = self.blur(images)` are at hand already."""
        scales = list(zip(self.schedule.states, self.schedule.view_sizes, strict=True))
        focused = [decimate(blurred[state], size) for state, size in scales]
        downsampled = [decimate(images, size) for _, size in scales]
        alias = [d - f for d, f in zip(downsampled, focused, strict=True)]
        return Views(focused, downsampled, alias)

    def blur(self, images: Tensor) -> list[Tensor]:
        """The K focus states at full size, each (B, C, H, W), the sharp one last: the images themselves.

        Raises:
            ValueError: if the images have another size than the schedule's.
        """
        size, margin = self.schedule.image_size, self._margin
        if images.ndim != 4 or images.shape[-2:] != (size, size):
            raise ValueError(
                f"images must measure (B, C, {size}, {size}), the schedule's image_size, got {tuple(images.shape)}"
            )
        if margin == 0:
            return [images] * self.schedule.focus_states
        exact = images if images.dtype == torch.float64 else images.float()
        spectrum = torch.fft.fft2(F.pad(_pair_channels(exact), (margin,) * 4, mode="reflect"), s=self._shape)
        states = []
        for transfer in self._transfers(spectrum):
            if transfer is None:
                states.append(images)
            else:
                blurred = torch.fft.ifft2(spectrum * transfer)[..., margin : margin + size, margin : margin + size]
                states.append(_part_channels(blurred, images.shape[1]).to(images.dtype))
        return states

    def _transfers(self, spectrum: Tensor) -> list[Tensor | None]:
        """The states' transfer functions in the dtype and on the device of a spectrum; None for the sharp ones."""
        key = (spectrum.device, spectrum.dtype)
        if key not in self._transfer_on:
            with torch.inference_mode(False):  # made in a validation loop, they must serve a later backward pass
                self._transfer_on[key] = [None if t is None else t.to(spectrum) for t in self._transfer]
        return self._transfer_on[key]


def _pair_channels(images: Tensor) -> Tensor:
    """(B, C, H, H) real -> (B, ceil(C / 2), H, H) complex: the second half of the channels as imaginary parts.

    A real kernel keeps the two apart, and in PyTorch two real transforms of a plane are several times slower than one
    complex one. Pairs lie within an image: no image can change another's rounding.
    """
    real, imaginary = images.tensor_split([(images.shape[1] + 1) // 2], dim=1)
    missing = real.shape[1] - imaginary.shape[1]
    return torch.complex(real, F.pad(imaginary, (0, 0, 0, 0, 0, missing)))


def _part_channels(pairs: Tensor, channels: int) -> Tensor:
    """Inverse of `_pair_channels`."""
    return torch.cat((pairs.real, pairs.imag[:, : channels - pairs.shape[1]]), dim=1)


def _spectrum(kernel: Tensor, side: int) -> Tensor:
    """Fourier transform of a kernel centred on pixel (0, 0) of a periodic square."""
    half, room = kernel.shape[-1] // 2, side - kernel.shape[-1]
    return torch.fft.fft2(F.pad(kernel, (0, room, 0, room)).roll((-half, -half), (-2, -1)))


def _fast_length(length: int) -> int:
    """The next length without a prime factor above 7: Fourier transforms of others are several times slower."""
    while True:
        rest = length
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
