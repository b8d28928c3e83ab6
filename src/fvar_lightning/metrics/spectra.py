"""Metrics of mean power spectra: detail that is missing or invented, and the grid that a latent stride leaves.

Images are taken less their mean and under a Hann window, so that their borders do not leak over all frequencies; the
power is summed over images and averaged over channels. Legend: N side in pixels, R = N / 2 - 1 rings.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from fvar_lightning.metrics.alias import decibel


def power_spectrum(images: Tensor) -> Tensor:
    """Windowed power |FFT|^2 / N^2 summed over images, averaged over channels: (N, N) float64, zero frequency at 0, 0.

    Args:
        images: (B, C, N, N).
    """
    size = images.shape[-1]
    x = images.double()
    x = x - x.mean(dim=(-2, -1), keepdim=True)
    window = torch.hann_window(size, dtype=x.dtype, device=x.device)
    return torch.fft.fft2(x * window * window[:, None]).abs().square().mean(dim=1).sum(dim=0) / size**2


def _radii(size: int, device: torch.device) -> Tensor:
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=device)
    return torch.hypot(k[:, None], k[None, :])


def _check_square(images: Tensor, size: int) -> None:
    if images.dim() != 4 or images.shape[-2:] != (size, size):
        raise ValueError(f"images must be (B, C, {size}, {size}) as image_size says, got {tuple(images.shape)}")


class RadialSpectrumDistance(Metric):
    """Log-spectral distance of azimuthally averaged power spectra, generated against real, in dB (lower is better).

    With p(k) the mean power of ring k (frequencies with k - 1/2 <= |f| N < k + 1/2, k = 1..R):
    sqrt(mean_k (10 log10 p_generated(k) / p_real(k))^2), over all rings and over each third of them.
    ``tilt`` of a third is the signed mean: negative where detail is missing, positive where it is invented.

    Args:
        image_size: N, even.

    Raises:
        ValueError: if N is odd or below 8; of `update` if the images have another size.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    power: Tensor
    count: Tensor

    def __init__(self, image_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        if image_size < 8 or image_size % 2:
            raise ValueError(f"image_size must be even and at least 8, got {image_size}")
        self.image_size = image_size
        self.add_state("power", torch.zeros(2, image_size // 2 - 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, real: bool) -> None:
        """Adds images (B, C, N, N) to the real or to the generated ones."""
        _check_square(images, self.image_size)
        rings = (_radii(self.image_size, images.device) + 0.5).long().flatten()
        sums = torch.zeros(int(rings.max()) + 1, dtype=torch.float64, device=images.device)
        sums = sums.index_add(0, rings, power_spectrum(images).flatten())
        self.power[int(real)] += (sums / torch.bincount(rings))[1 : self.image_size // 2]
        self.count[int(real)] += len(images)

    def compute(self) -> dict[str, Tensor]:
        """``distance``, ``distance_low``, ``distance_mid``, ``distance_high`` and ``tilt_low``, ... in dB.

        Raises:
            ValueError: without generated or without real images.
        """
        if not self.count.all():
            raise ValueError(f"generated and real images are needed, got {self.count.tolist()}")
        generated, real = self.power / self.count[:, None]
        level = decibel(generated / real)
        values = {"distance": level.square().mean().sqrt()}
        for name, third in zip(("low", "mid", "high"), level.tensor_split(3), strict=True):
            values[f"distance_{name}"] = third.square().mean().sqrt()
            values[f"tilt_{name}"] = third.mean()
        return values


class GridArtifact(Metric):
    """Power at the harmonics of a latent stride over the median of their annulus, in dB (0 is none).

    Harmonics are the frequencies (i, j) / stride, other than zero, at most 1/2 from it. For each, the median is taken
    of the frequencies at the same distance from zero within a bin, less all harmonics and their eight neighbours
    (over which the window spreads them); then the mean of the ratios over harmonics, in dB. The median of a single
    image's power lies 1.6 dB below its mean, that of many at it. Photographs have more power along the axes than
    elsewhere: compare with real images' own value.

    Args:
        stride: pixels per token, 2 or more.
        image_size: N, a multiple of the stride, four times at least.

    Raises:
        ValueError: for another stride or size.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    power: Tensor
    count: Tensor

    def __init__(self, stride: int, image_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        if stride < 2:
            raise ValueError(f"stride must be at least 2, got {stride}")
        if image_size < 4 * stride or image_size % stride:
            raise ValueError(f"image_size must be 4 strides ({4 * stride}) or more whole ones, got {image_size}")
        self.stride = stride
        self.image_size = image_size
        self.add_state("power", torch.zeros(image_size, image_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Adds images (B, C, N, N)."""
        _check_square(images, self.image_size)
        self.power += power_spectrum(images)
        self.count += len(images)

    def compute(self) -> Tensor:
        """The level in dB, a scalar.

        Raises:
            ValueError: without images.
        """
        if not self.count:
            raise ValueError("images are needed, got none")
        step = self.image_size // self.stride
        radii = _radii(self.image_size, self.power.device)
        offset = torch.arange(self.image_size, device=self.power.device) % step
        near = (offset <= 1) | (offset == step - 1)
        background = ~(near[:, None] & near)
        on = offset == 0
        harmonic = (on[:, None] & on) & (radii > 0) & (radii <= self.image_size / 2)
        ratios = [
            self.power[tuple(at)] / self.power[background & ((radii - radii[tuple(at)]).abs() <= 1)].quantile(0.5)
            for at in harmonic.nonzero()
        ]
        return decibel(torch.stack(ratios).mean())
