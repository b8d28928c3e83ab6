"""Test charts and what is read from them: MTF50 of a slanted edge, spurious (moire) energy of a zone plate.

Charts are grey images (1, 3, N, N) in [-1, 1]; frequencies are cycles per pixel of the chart. They are made in float64
on the CPU and handed out as float32.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fvar_lightning.metrics.alias import decibel, ideal_lowpass

ALPHABET = "The quick brown fox jumps over the lazy dog 0123456789"


def _coordinates(size: int) -> tuple[Tensor, Tensor]:
    """x (1, N) and y (N, 1) of the pixel centres, 0 in the middle of the image."""
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    c = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    return c[None, :], c[:, None]


def _chart(grey: Tensor) -> Tensor:
    return grey.float().expand(1, 3, -1, -1).clone()


def zone_plate(size: int, max_frequency: float = 0.5) -> Tensor:
    """cos(pi f_max r^2 / R), R = N / 2: the frequency at distance r from the centre is f_max r / R.

    Args:
        size: N.
        max_frequency: f_max, at the middle of the borders; towards the corners it grows on to 0.5, and the chart is
            grey beyond.

    Raises:
        ValueError: for a frequency outside (0, 0.5].
    """
    if not 0 < max_frequency <= 0.5:
        raise ValueError(f"max_frequency must lie in (0, 0.5] cycles per pixel, got {max_frequency}")
    x, y = _coordinates(size)
    square, radius = x.square() + y.square(), size / 2
    frequency = max_frequency * square.sqrt() / radius
    return _chart(torch.cos(math.pi * max_frequency * square / radius) * (frequency <= 0.5))


def siemens_star(size: int, spokes: int = 36) -> Tensor:
    """cos(n theta) inside the circle of radius N / 2: the frequency at distance r is n / (2 pi r).

    Where it passes 0.5 in the middle, and outside of the circle, the chart is grey.

    Raises:
        ValueError: for spokes outside 1..N, where nothing would be left of the star.
    """
    x, y = _coordinates(size)
    if not 1 <= spokes <= size:
        raise ValueError(f"spokes must lie in 1..{size}, got {spokes}")
    radius = torch.hypot(x, y)
    inside = (radius <= size / 2) & (radius >= spokes / math.pi)
    return _chart(torch.cos(spokes * torch.atan2(y, x)) * inside)


def slanted_edge(size: int, angle: float = 5.0, sigma: float = 0.5) -> Tensor:
    """An edge `angle` degrees off the vertical, blurred by a Gaussian: contrast 0.8, erf(d / (sigma sqrt 2)).

    Args:
        size: N.
        angle: in degrees, nonzero and below 45.
        sigma: of the Gaussian, in pixels; its MTF is exp(-2 (pi sigma f)^2), 0.29 at Nyquist for 0.5.

    Raises:
        ValueError: for another angle or sigma.
    """
    if not 0 < abs(angle) < 45:
        raise ValueError(f"angle must be nonzero and lie in (-45, 45) degrees, got {angle}")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0 pixels, got {sigma}")
    x, y = _coordinates(size)
    a = math.radians(angle)
    return _chart(0.8 * torch.erf((x * math.cos(a) + y * math.sin(a)) / (sigma * math.sqrt(2))))


def fine_text(size: int, heights: tuple[int, ...] = (6, 8, 10, 12, 16, 20, 24, 32), text: str = ALPHABET) -> Tensor:
    """Black text on white, a line or more of every height, as far as they fit.

    Args:
        size: N.
        heights: of the font, in pixels.
        text: repeated to fill the lines.
    """
    _coordinates(size)
    page = Image.new("L", (size, size), 255)
    draw = ImageDraw.Draw(page)
    top = 2
    for height in heights:
        draw.text((2, top), f"{text} " * 4, fill=0, font=ImageFont.load_default(height))
        top += math.ceil(1.3 * height)
    return _chart(torch.from_numpy(np.asarray(page, dtype=np.float64)) / 127.5 - 1)


def edge_mtf(images: Tensor, oversampling: int = 4) -> tuple[Tensor, Tensor]:
    """Modulation transfer across a slanted, nearly vertical edge, by the method of ISO 12233.

    The edge is found in every row (centroid of the derivative), a line is fitted, all pixels are put in bins of
    1 / `oversampling` px by their distance from it; the derivative of that edge profile, under a Hamming window, is
    Fourier transformed; the bins' and the derivative's own transfer is divided out.

    Args:
        images: (B, C, H, W), averaged over B and C.
        oversampling: bins per pixel.

    Returns:
        Frequencies (F,) from 0 to 0.5 in cycles per pixel, and the transfer (F,), 1 at 0; float64.

    Raises:
        ValueError: where no edge is found, or one that is not slanted.
    """
    image = images.detach().double().mean(dim=(0, 1))
    height, width = image.shape
    slope, offset = _fit_edge(image)
    rows = torch.arange(height, dtype=torch.float64, device=image.device)[:, None]
    columns = torch.arange(width, dtype=torch.float64, device=image.device)[None, :]
    distance = (columns - slope * rows - offset) / math.hypot(1, slope)
    reach = min(int(-distance[:, 0].max()), int(distance[:, -1].min()))  # as far as every row goes to both sides
    if reach < 8:
        raise ValueError(f"images must show the edge 8 pixels or more from both sides, it comes within {reach}")
    bins = ((distance + reach) * oversampling).floor().long()
    inside = (bins >= 0) & (bins < 2 * reach * oversampling)
    length = 2 * reach * oversampling
    counts = torch.bincount(bins[inside], minlength=length)
    if (counts == 0).any():
        raise ValueError(
            f"images must show an edge slanted enough to fill {oversampling} bins a pixel, slope {slope:.4f}"
        )
    profile = torch.zeros(length, dtype=image.dtype, device=image.device)
    profile = profile.index_add(0, bins[inside], image[inside]) / counts
    spread = profile.diff()
    window = torch.hamming_window(len(spread), periodic=False, dtype=spread.dtype, device=spread.device)
    transfer = torch.fft.rfft(spread * window, n=length).abs()
    frequency = torch.arange(len(transfer), dtype=torch.float64, device=image.device) / (2 * reach)
    keep = frequency <= 0.5
    frequency, transfer = frequency[keep], transfer[keep] / transfer[0]
    # both the bins (boxes of 1 / oversampling px) and the differences have the transfer sinc(f / oversampling)
    return frequency, transfer / torch.sinc(frequency / oversampling).square()


def _fit_edge(image: Tensor) -> tuple[float, float]:
    """Slope and offset of column = slope * row + offset along the edge."""
    height, width = image.shape
    derivative = image.diff(dim=1)
    if derivative.sum() < 0:
        derivative = -derivative
    rows = torch.arange(height, dtype=image.dtype, device=image.device)
    columns = torch.arange(width - 1, dtype=image.dtype, device=image.device) + 0.5
    window = torch.ones_like(derivative)
    slope, offset = 0.0, 0.0
    for _ in range(3):  # the first pass sees noise of the whole row, the next ones the neighbourhood of the edge
        weight = (derivative * window).clamp(min=0)
        mass = weight.sum(dim=1)
        if (mass <= 0).any():
            raise ValueError("images must show one nearly vertical edge that crosses every row")
        centres = (weight * columns).sum(dim=1) / mass
        centred = rows - rows.mean()
        slope = float((centred * centres).sum() / centred.square().sum())
        offset = float(centres.mean() - slope * rows.mean())
        window = ((columns - slope * rows[:, None] - offset).abs() < max(4.0, width / 16)).to(image.dtype)
    return slope, offset


def mtf50(images: Tensor) -> float:
    """Frequency in cycles per pixel at which `edge_mtf` first falls to one half; 0.5 if it never does.

    An image at the size of the chart is compared with the chart's own value; a down-sampled one has larger pixels.
    """
    frequency, transfer = edge_mtf(images)
    below = (transfer < 0.5).nonzero().flatten()
    if len(below) == 0:
        return 0.5
    i = int(below[0])
    fraction = (transfer[i - 1] - 0.5) / (transfer[i - 1] - transfer[i])
    return float(frequency[i - 1] + fraction * (frequency[i] - frequency[i - 1]))


def moire_energy(
    images: Tensor, chart_size: int, factor: float, max_frequency: float = 0.5, guard: float = 1.25
) -> Tensor:
    """Spurious energy of a processed `zone_plate`: what is shown where nothing can be shown without aliasing, in dB.

    Where the chart's frequency f_max r / R lies between `guard` / (2 factor) and f_max, a grid coarser by `factor`
    holds none of it: an alias-free image is grey there. The mean square there, of what lies below the coarse grid's
    Nyquist limit, over the chart's own (1/2). Plain decimation gives 0 dB, a filter H before it the mean of |H|^2
    over the region. At full size the chart's own edges set a floor: untouched, one of 256 px measures -17 dB for
    factor 2 and -25 dB for 8.

    Args:
        images: (B, C, n, n), the chart after down-sampling by `factor`, or at full size after down- and up-sampling,
            or a reconstruction that claims a resolution `factor` times lower.
        chart_size: N of the chart.
        factor: above `guard` / (2 max_frequency).
        max_frequency: f_max that the chart was made with.
        guard: keeps off the chart's transition to the frequencies that may be shown.

    Raises:
        ValueError: for a factor that leaves no such region.
    """
    low, high = guard / (2 * factor), max_frequency
    if low >= high:
        raise ValueError(f"factor must be above {guard / (2 * max_frequency):.3g} for this chart, got {factor}")
    size = images.shape[-1]
    position = (torch.arange(size, dtype=torch.float64, device=images.device) + 0.5) / size * 2 - 1
    frequency = max_frequency * torch.hypot(position[:, None], position[None, :])
    region = (frequency > low) & (frequency <= high)
    x = images.double()
    grey = x[..., region].mean(dim=-1)[..., None, None]
    cutoff = 0.5 / factor * chart_size / size
    if cutoff < 0.5:
        x = ideal_lowpass(x, cutoff)
    return decibel(2 * (x - grey)[..., region].square().mean())
