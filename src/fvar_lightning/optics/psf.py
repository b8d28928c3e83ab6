"""Point-spread functions: how a lens out of focus spreads one point over the pixels, and what it leaves of a frequency.

Every kernel is a square of odd side that sums to 1, made in float64 and handed out in `dtype`. A pixel's weight is the
integral of the aperture over the unit pixel, not a sample at its centre, so that radii of a fraction of a pixel work.
Radii are pixels at full resolution, frequencies cycles per pixel.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fvar_lightning.schedule import ALIAS_FREE_RATIO

LANCZOS_LOBES = 3
GAUSSIAN_REACH = 5.0
"""Standard deviations after which the Gaussian is cut: what is lost of its second moment is 1.5e-5."""


def disk_psf(radius: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform disk: the defocus of an ideal lens with a circular aperture (paper section 3.2).

    Each pixel's weight is the exact area the disk covers in it. With G(x, y) the area of the disk within
    [0, x] x [0, y], odd in both arguments, a pixel's area is the difference of G over its four corners.

    Args:
        radius: pixels, at least 0; 0 is the identity, and so is any disk that fits into the central pixel.
        dtype: of the result; the computation is in float64.

    Returns:
        (n, n), n = 2 ceil(radius - 1/2) + 1, sum 1.

    Raises:
        ValueError: if the radius is negative or not finite.
    """
    _check_radius(radius)
    if radius <= 0.5:
        return torch.ones(1, 1, dtype=dtype, device="cpu")
    edges = _pixel_edges(radius)
    size = edges.abs().clamp(max=radius)
    x, y = size[None, :], size[:, None]
    meets = (radius**2 - y**2).clamp(min=0).sqrt()  # where the circle comes down to height y
    area = y * torch.minimum(x, meets) + _segment(torch.maximum(x, meets), radius) - _segment(meets, radius)
    area = (area * edges.sign()[None, :] * edges.sign()[:, None]).diff(dim=0).diff(dim=1)
    nearest = torch.minimum(size[:-1], size[1:])
    nearest[len(nearest) // 2] = 0
    touched = nearest[None, :] ** 2 + nearest[:, None] ** 2 < radius**2
    return _normalise(torch.where(touched, area, 0.0), dtype)  # exactly zero where the differences leave rounding


def gaussian_psf(radius: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian of the disk's second moment, sigma = radius / 2, integrated over each pixel, cut at 5 sigma.

    Args and errors as for `disk_psf`. Returns (n, n), n odd, sum 1.
    """
    _check_radius(radius)
    if radius == 0:
        return torch.ones(1, 1, dtype=dtype, device="cpu")
    sigma = radius / 2
    # erfc on |x| keeps the relative precision of the tails
    edges = _pixel_edges(GAUSSIAN_REACH * sigma)
    below = torch.special.erfc(edges.abs() / (sigma * math.sqrt(2))) / 2
    cumulative = torch.where(edges < 0, below, 1 - below)
    weights = cumulative.diff()
    return _normalise(weights[:, None] * weights[None, :], dtype)


def polygon_psf(radius: float, blades: int = 6, rotation: float = 0.0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Regular polygon, the aperture of a diaphragm with straight blades, of the same area as the disk.

    Each pixel's weight is the exact area of the polygon in it: by Green's theorem the integral of
    clamp(x - x0, 0, 1) dy along the polygon's outline, over the part of every edge that lies in the pixel's row.

    Args:
        radius: of the disk of equal area, in pixels, at least 0; 0 is the identity.
        blades: number of edges, at least 3.
        rotation: angle of the first corner in radians, from the horizontal axis towards growing row numbers.
        dtype: of the result; the computation is in float64.

    Returns:
        (n, n), n odd, sum 1.

    Raises:
        ValueError: if the radius is negative or not finite, or there are fewer than 3 blades.
    """
    _check_radius(radius)
    if blades < 3:
        raise ValueError(f"blades must be at least 3, got {blades}")
    if radius == 0:
        return torch.ones(1, 1, dtype=dtype, device="cpu")
    circumradius = radius * math.sqrt(2 * math.pi / (blades * math.sin(2 * math.pi / blades)))
    angles = rotation + torch.arange(blades, dtype=torch.float64, device="cpu") * (2 * math.pi / blades)
    x, y = circumradius * angles.cos(), circumradius * angles.sin()
    edges = _pixel_edges(max(float(x.abs().max()), float(y.abs().max())))

    # The part of every outline edge within every row of pixels: (blades, n)
    x, y = x[:, None], y[:, None]
    dx, dy = x.roll(-1, 0) - x, y.roll(-1, 0) - y
    enter = torch.clamp(y, edges[:-1], edges[1:])
    leave = torch.clamp(y + dy, edges[:-1], edges[1:])
    slope = torch.where(dy == 0, 0.0, dx / dy)
    # ... and its distance from every pixel's left side: (blades, n rows, n columns)
    start = (x + (enter - y) * slope)[:, :, None] - edges[:-1]
    stop = (x + (leave - y) * slope)[:, :, None] - edges[:-1]
    area = ((leave - enter)[:, :, None] * _mean_clamped(start, stop)).sum(0)
    return _normalise(area.clamp(min=0), dtype)


def lanczos_psf(radius: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lanczos-3 low-pass of the down-sampling factor s = radius / 1.22 for which a disk of that radius is alias-free.

    No aperture, its weights are partly negative: the reference an optical blur is compared with. Sampled at the pixel
    centres as resampling filters are; the identity where s <= 1.

    Args and errors as for `disk_psf`. Returns (n, n), n odd, sum 1.
    """
    _check_radius(radius)
    factor = radius / ALIAS_FREE_RATIO
    if factor <= 1:
        return torch.ones(1, 1, dtype=dtype, device="cpu")
    half = math.ceil(LANCZOS_LOBES * factor) - 1
    x = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu") / factor
    weights = torch.sinc(x) * torch.sinc(x / LANCZOS_LOBES)
    return _normalise(weights[:, None] * weights[None, :], dtype)


def identity_psf(radius: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """No blur at any radius: the ablation "w/o progressive refocusing". Returns [[1.]]."""
    _check_radius(radius)
    return torch.ones(1, 1, dtype=dtype, device="cpu")


PSFS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"disk": disk_psf, "gaussian": gaussian_psf, "polygon": polygon_psf, "lanczos": lanczos_psf, "none": identity_psf}
)
"""The point-spread functions a configuration can name."""


def make_psf(name: str, radius: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The kernel (n, n) of a named point-spread function: one of `PSFS`.

    Raises:
        ValueError: if there is no such function, or the radius is negative or not finite.
    """
    return PSFS[check_psf(name)](radius, dtype=dtype)


def check_psf(name: str | None) -> str:
    """The name, if it is one of `PSFS`.

    Raises:
        ValueError: naming those that are.
    """
    if name is None or name not in PSFS:
        raise ValueError(f"psf must be one of {', '.join(PSFS)}, got {name!r}")
    return name


def disk_transfer(radius: float, frequency: Tensor) -> Tensor:
    """Transfer function of the continuous disk, 2 J1(z) / z with z = 2 pi radius f, at any frequency; 1 at 0."""
    z = 2 * math.pi * radius * frequency
    return torch.where(z == 0, 1.0, 2 * torch.special.bessel_j1(z) / z)


def gaussian_transfer(radius: float, frequency: Tensor) -> Tensor:
    """Transfer function of the continuous Gaussian, exp(-2 (pi sigma f)^2) with sigma = radius / 2."""
    return torch.exp(-2 * (math.pi * radius / 2 * frequency) ** 2)


def transfer_function(psf: Tensor, frequency: Tensor) -> Tensor:
    """What a kernel (n, n) leaves of horizontal waves: the real part of its discrete-time Fourier transform.

    Complete for kernels that are symmetric about the vertical axis. Returns a tensor shaped as `frequency`.
    """
    half = psf.shape[-1] // 2
    x = torch.arange(-half, half + 1, dtype=psf.dtype, device=psf.device)
    return torch.cos(2 * math.pi * frequency[..., None] * x) @ psf.sum(0)


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be a finite number of pixels, at least 0, got {radius}")


def _pixel_edges(reach: float) -> Tensor:
    """The n + 1 pixel borders about the origin of the fewest pixels, n odd, that hold [-reach, reach]."""
    half = max(math.ceil(reach - 0.5), 0)
    return torch.arange(-half, half + 2, dtype=torch.float64, device="cpu") - 0.5


def _segment(x: Tensor, radius: float) -> Tensor:
    """Antiderivative of the circle sqrt(radius^2 - x^2)."""
    height = (radius**2 - x**2).clamp(min=0).sqrt()
    return (x * height + radius**2 * torch.asin((x / radius).clamp(max=1))) / 2


def _mean_clamped(start: Tensor, stop: Tensor) -> Tensor:
    """Mean of clamp(u, 0, 1) over u from start to stop."""
    length = stop - start
    within = stop.clamp(0, 1) - start.clamp(0, 1)
    beyond = stop.clamp(min=1) - start.clamp(min=1)
    mean = (within * (stop.clamp(0, 1) + start.clamp(0, 1)) / 2 + beyond) / length
    return torch.where(length == 0, start.clamp(0, 1), mean)


def _normalise(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return (weights / weights.sum()).to(dtype)
