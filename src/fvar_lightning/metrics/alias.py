"""Alias metrics of operators: what a down-sampling folds into its pass-band, and whether a model moves with its input.

Legend: s down-sampling factor, f frequency in cycles per pixel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

ImageMap = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to images; the result may have another size."""

DEFAULT_SHIFTS = ((1, 0), (0, 3), (5, -7), (0.5, 0), (0, 0.5), (2.25, -3.75))


def decibel(ratio: Tensor) -> Tensor:
    """10 log10; 0 gives -inf."""
    return 10 * ratio.log10()


def ideal_lowpass(images: Tensor, cutoff: float, boundary: Literal["reflect", "periodic"] = "reflect") -> Tensor:
    """Keeps the frequencies with |f_x| < cutoff and |f_y| < cutoff (cycles per pixel), removes the others altogether.

    Args:
        images: (B, C, H, W), float32 or float64.
        cutoff: at most 0.5 keeps something off.
        boundary: ``reflect`` continues the images by mirroring, so that their borders are no jumps (natural images);
            ``periodic`` takes them as periods (spectra and test signals made in the Fourier domain).
    """
    height, width = images.shape[-2:]
    if boundary == "reflect":
        images = torch.cat([images, images.flip(-1)], -1)
        images = torch.cat([images, images.flip(-2)], -2)
    spectrum = torch.fft.rfft2(images)
    # half a bin below the cutoff: rounding must not decide on a bin that lies on it
    keep_y = torch.fft.fftfreq(images.shape[-2], device=images.device).abs() < cutoff - 0.25 / images.shape[-2]
    keep_x = torch.fft.rfftfreq(images.shape[-1], device=images.device) < cutoff - 0.25 / images.shape[-1]
    low = torch.fft.irfft2(spectrum * (keep_y[:, None] & keep_x[None, :]), s=images.shape[-2:])
    return low[..., :height, :width]


class AliasEnergyRatio(Metric):
    """Alias energy over signal energy of a down-sampling operator D at factor s, in dB (lower is better).

    With P the ideal low-pass to 1/(2s), what the coarse grid can hold, and x images less their mean (the mean aliases
    nowhere, and would drown everything else):

        alias = 10 log10 (sum |D(x - Px)|^2 / sum |D(Px)|^2)
        droop = 10 log10 (mean |D(Px)|^2 / mean |Px|^2)

    `droop` is what D takes from the pass-band itself: 0 dB for plain decimation, negative for a blur. The ratio alone
    rewards strong blurs, which lose more than they fold; read both. Expected on fields with the power 1/f^2 of 256 px
    at s = 8: plain decimation -1.9 dB, area mean -14.6, disk of radius 1.22 s -25.8, Gaussian of its second moment
    -30.9. The level falls with the size of such a field, whose signal grows by its lower frequencies.

    Args:
        operator: D, linear, images (B, C, H, W) to (B, C, H', W').
        factor: s > 1, need not be whole.
        boundary: how P continues the images, see `ideal_lowpass`.

    Raises:
        ValueError: for a factor that is not above 1.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    alias: Tensor
    signal: Tensor
    passband: Tensor

    def __init__(
        self, operator: ImageMap, factor: float, boundary: Literal["reflect", "periodic"] = "reflect", **kwargs
    ) -> None:
        super().__init__(**kwargs)
        if not factor > 1:
            raise ValueError(f"factor must be above 1, got {factor}")
        # a tuple: a module among the attributes would enter the state dict
        self._operator = (operator,)
        self.factor = factor
        self.boundary: Literal["reflect", "periodic"] = boundary
        for name in ("alias", "signal", "passband"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Adds images (B, C, H, W) in [-1, 1], without gradients."""
        (operator,) = self._operator
        x = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        x = x - x.mean(dim=(-2, -1), keepdim=True)
        low = ideal_lowpass(x, 0.5 / self.factor, self.boundary)
        self.alias += _energy(operator(x - low))
        self.signal += _energy(operator(low))
        self.passband += _energy(low)

    def compute(self) -> dict[str, Tensor]:
        """``alias`` and ``droop`` in dB."""
        return {"alias": decibel(self.alias / self.signal), "droop": decibel(self.signal / self.passband)}


def _energy(x: Tensor) -> Tensor:
    """Mean square of every image, added up."""
    return x.double().square().mean(dim=(-3, -2, -1)).sum()


def translate(images: Tensor, down: float, right: float) -> Tensor:
    """Images moved by a number of pixels, whole or not, new content being mirrored.

    The fraction is a windowed sinc (Lanczos, 6 taps, as StyleGAN3's `EQ-T_frac` uses for its reference).

    Args:
        images: (B, C, H, W), sides above ceil(|shift|) + 4.
        down: shift of the rows.
        right: shift of the columns.
    """
    kernels = [_shift_kernel(shift - math.floor(shift)).to(images) for shift in (down, right)]
    pads = [(math.floor(shift), math.ceil(abs(shift)) + 4) for shift in (down, right)]
    (whole_y, pad_y), (whole_x, pad_x) = pads
    channels, (height, width) = images.shape[1], images.shape[-2:]
    x = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    x = F.conv2d(x, kernels[0].view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(3, 0), groups=channels)
    x = F.conv2d(x, kernels[1].view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, 3), groups=channels)
    top, left = pad_y - whole_y, pad_x - whole_x
    return x[..., top : top + height, left : left + width]


def _shift_kernel(fraction: float) -> Tensor:
    """(7,) correlation kernel that moves a signal by `fraction` in [0, 1) to the right; sum 1."""
    t = torch.arange(-3, 4, dtype=torch.float64, device="cpu") + fraction
    kernel = torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), 0.0)
    return kernel / kernel.sum()


class ShiftEquivariance(Metric):
    """PSNR between a model's output for moved images and its moved output, in dB (higher is better; inf is perfect).

    EQ-T of StyleGAN3 (Karras et al. 2021) for a map of images to images, such as a tokenizer's reconstruction:
    10 log10 (4 / mean |g(t(x)) - t(g(x))|^2) for images in [-1, 1], over the pixels whose distance from the border is
    above the shift and `margin`.

    Args:
        model: g, images (B, 3, H, W) to images of the same size.
        shifts: (down, right) in pixels. Those with two whole numbers are averaged into ``integer``, the others into
            ``fractional``. Each costs one pass of the model.
        margin: pixels at the border that are left out besides the shift.

    Raises:
        ValueError: for no shifts.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    error: Tensor
    count: Tensor

    def __init__(
        self,
        model: ImageMap,
        shifts: Sequence[tuple[float, float]] = DEFAULT_SHIFTS,
        margin: int = 8,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if not shifts:
            raise ValueError("shifts must name at least one (down, right) pair, got none")
        # a tuple: a module among the attributes would enter the state dict
        self._model = (model,)
        self.shifts = tuple(shifts)
        self.margin = margin
        self.add_state("error", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Adds images (B, 3, H, W) in [-1, 1], without gradients.

        Raises:
            ValueError: for images too small for the shifts and the margin.
        """
        (model,) = self._model
        reach = max(math.ceil(max(abs(d), abs(r))) for d, r in self.shifts) + self.margin
        if min(images.shape[-2:]) <= max(2 * reach, reach - self.margin + 4):
            raise ValueError(f"images must measure more than {2 * reach} px for these shifts, got {images.shape[-2:]}")
        output = model(images)
        for down, right in self.shifts:
            moved = model(translate(images, down, right))
            border = math.ceil(max(abs(down), abs(right))) + self.margin
            inner = (..., slice(border, -border or None), slice(border, -border or None))
            difference = (moved - translate(output, down, right))[inner].double()
            kind = 0 if float(down).is_integer() and float(right).is_integer() else 1
            self.error[kind] += difference.square().mean(dim=(-3, -2, -1)).sum()
            self.count[kind] += len(images)

    def compute(self) -> dict[str, Tensor]:
        """``integer`` and ``fractional`` in dB, each if there are such shifts."""
        values = decibel(4 * self.count / self.error)
        kinds = ("integer", "fractional")
        return {kind: value for kind, value, count in zip(kinds, values, self.count, strict=True) if count > 0}
