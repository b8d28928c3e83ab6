"""Alias metrics against closed forms, and against NumPy code that shares nothing with the implementation."""

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn
from torch.nn import functional as F

from fvar_lightning.metrics.alias import AliasEnergyRatio, ShiftEquivariance, ideal_lowpass, translate
from fvar_lightning.metrics.spectra import GridArtifact, RadialSpectrumDistance
from fvar_lightning.optics.psf import disk_psf, gaussian_psf

N, S = 256, 8
RADIUS = 1.22 * S


def frequencies(size=N):
    f = np.fft.fftfreq(size)
    return f[:, None], f[None, :]


def make_fields(count, size=N, seed=0):
    """Gaussian random fields with the power spectrum 1 / f^2, no mean, periodic."""
    fy, fx = frequencies(size)
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1e-9)
    amplitude[0, 0] = 0
    noise = np.random.default_rng(seed).normal(size=(count, 1, size, size))
    return torch.from_numpy(np.fft.ifft2(np.fft.fft2(noise) * amplitude).real)


def decimate(x):
    return x[..., S // 2 :: S, S // 2 :: S]


def blurred(kernel):
    """Circular convolution with a kernel, then decimation."""
    reach = kernel.shape[0] // 2
    padded = torch.zeros(N, N, dtype=torch.float64)
    padded[: kernel.shape[0], : kernel.shape[1]] = kernel
    response = torch.fft.rfft2(padded.roll((-reach, -reach), (0, 1)))
    return lambda x: decimate(torch.fft.irfft2(torch.fft.rfft2(x) * response, s=(N, N)))


def transfer(name):
    """|H|^2 of the operators' filters, analytically."""
    fy, fx = frequencies()
    f = np.hypot(fy, fx)
    if name == "plain":
        return np.ones((N, N))
    if name == "area":  # the mean of 8 pixels: a Dirichlet kernel

        def mean(g):
            with np.errstate(invalid="ignore"):
                return np.where(g == 0, 1, np.sin(np.pi * g * S) / (S * np.sin(np.pi * g)))

        return (mean(fx) * mean(fy)) ** 2
    # a PSF integrated over pixels has the pixel's own transfer besides
    pixel = np.sinc(fx) * np.sinc(fy)
    if name == "disk":
        z = 2 * np.pi * RADIUS * f
        with np.errstate(invalid="ignore"):
            return (pixel * np.where(z == 0, 1, 2 * scipy.special.j1(z) / z)) ** 2
    sigma = RADIUS / 2
    return (pixel * np.exp(-2 * (np.pi * sigma * f) ** 2)) ** 2


def expected_levels(name):
    """For fields of independent phases decimation adds powers: integrate spectrum times transfer in and out of band."""
    fy, fx = frequencies()
    with np.errstate(divide="ignore"):
        power = 1 / (fy**2 + fx**2)
    power[0, 0] = 0
    band = (np.abs(fy) < 0.5 / S) & (np.abs(fx) < 0.5 / S)
    passed = power * transfer(name)
    alias = 10 * np.log10(passed[~band].sum() / passed[band].sum())
    return alias, 10 * np.log10(passed[band].sum() / power[band].sum())


OPERATORS = {
    "plain": decimate,
    "area": lambda x: F.avg_pool2d(x, S),
    "disk": blurred(disk_psf(RADIUS, dtype=torch.float64)),
    "gaussian": blurred(gaussian_psf(RADIUS, dtype=torch.float64)),
}


@pytest.mark.parametrize(
    ("name", "level"), [("plain", -1.89), ("area", -14.55), ("disk", -25.80), ("gaussian", -30.94)]
)
def test_alias_energy_ratio_on_natural_spectra(name, level):
    alias, droop = expected_levels(name)
    assert alias == pytest.approx(level, abs=0.01)  # written down: these are what the docs quote, at 256 px
    metric = AliasEnergyRatio(OPERATORS[name], S, boundary="periodic")
    for part in make_fields(32).split(16):
        metric.update(part)
    result = metric.compute()
    # the fields are a sample: their few lowest frequencies hold most of the signal
    assert float(result["alias"]) == pytest.approx(alias, abs=0.4)
    assert float(result["droop"]) == pytest.approx(droop, abs=0.1)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_alias_energy_ratio_equals_numpy(name):
    x = make_fields(2, seed=1) + 0.3
    metric = AliasEnergyRatio(OPERATORS[name], S, boundary="periodic")
    metric.update(x)
    signal = x.numpy() - x.numpy().mean((-2, -1), keepdims=True)
    spectrum = np.fft.fftshift(np.fft.fft2(signal), axes=(-2, -1))
    kept = np.zeros_like(spectrum)
    half = N // (2 * S) - 1
    middle = slice(N // 2 - half, N // 2 + half + 1)
    kept[..., middle, middle] = spectrum[..., middle, middle]
    low = np.fft.ifft2(np.fft.ifftshift(kept, axes=(-2, -1))).real
    alias, kept = (OPERATORS[name](torch.from_numpy(v)).numpy() for v in (signal - low, low))
    result = metric.compute()
    assert float(result["alias"]) == pytest.approx(10 * np.log10((alias**2).sum() / (kept**2).sum()), abs=1e-9)
    assert float(result["droop"]) == pytest.approx(10 * np.log10((kept**2).mean() / (low**2).mean()), abs=1e-9)


def test_alias_energy_ratio_of_two_waves():
    # one wave below Nyquist, one above of a tenth of its amplitude: plain decimation keeps both
    t = torch.arange(64, dtype=torch.float64)
    x = (torch.cos(2 * torch.pi * 3 * t / 64) + 0.1 * torch.cos(2 * torch.pi * 13 * t / 64)).expand(1, 1, 64, 64)
    metric = AliasEnergyRatio(lambda v: v[..., ::4, ::4], 4, boundary="periodic")
    metric.update(x + 5)
    assert float(metric.compute()["alias"]) == pytest.approx(-20, abs=1e-6)
    assert float(metric.compute()["droop"]) == pytest.approx(0, abs=1e-6)


def test_a_trainable_operator_leaves_no_graph():
    net = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for metric in (AliasEnergyRatio(net, 2), ShiftEquivariance(nn.Conv2d(1, 1, 3, padding=1), shifts=[(1, 0)])):
        metric.update(make_fields(1, 64).float())
        assert not any(value.requires_grad for value in metric.compute().values())


def test_alias_metric_holds_no_module_and_checks_its_factor():
    metric = AliasEnergyRatio(nn.Conv2d(1, 1, 3), 2)
    assert not metric.state_dict()
    assert not list(metric.parameters())
    with pytest.raises(ValueError, match="factor must be above 1, got 1"):
        AliasEnergyRatio(decimate, 1)


def test_reflected_lowpass_does_not_see_the_border_as_a_jump():
    ramp = torch.linspace(-1, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    errors = [(ideal_lowpass(ramp, 0.25, b) - ramp).abs().max() for b in ("reflect", "periodic")]
    assert errors[0] < 0.02
    assert errors[1] > 0.3


def test_translate_moves_a_wave_exactly():
    y, x = (torch.arange(64, dtype=torch.float64).view(shape) for shape in ((-1, 1), (1, -1)))

    def wave(down, right):
        return torch.cos(2 * torch.pi * (0.03 * (x - right) + 0.05 * (y - down)))[None, None]

    moved = translate(wave(0, 0), 2.25, -3.75)
    inner = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(moved[inner], wave(2.25, -3.75)[inner], atol=0.01, rtol=0)
    whole = translate(wave(0, 0), -5, 3)
    torch.testing.assert_close(whole[inner], wave(-5, 3)[inner], atol=1e-12, rtol=0)


def smooth(x):
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    weight = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])


def test_a_convolution_is_equivariant():
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    metric = ShiftEquivariance(smooth, shifts=[(3, -2), (0.5, 0.25)])
    metric.update(x)
    values = metric.compute()
    assert values["integer"] > 250  # float64 rounding
    assert values["fractional"] > 250


def test_a_grid_is_equivariant_to_its_own_stride_alone():
    def blocks(x):
        return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)

    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    levels = {}
    for shift in ((4, -8), (2, 0)):
        metric = ShiftEquivariance(blocks, shifts=[shift])
        for part in x.split(1):
            metric.update(part)
        levels[shift] = float(metric.compute()["integer"])
        assert set(metric.compute()) == {"integer"}
    assert levels[4, -8] > 250
    # in NumPy, on the pixels that both see: means over blocks that lie two rows apart
    image = x.numpy()

    def mean_blocks(v, offset):
        v = v[..., offset : offset + 56, :]
        means = v.reshape(2, 3, 14, 4, 16, 4).mean((3, 5))
        return means.repeat(4, -2).repeat(4, -1)

    # block borders of the moved image lie at original rows 2, 6, 10, ... Both are read at the original rows 8..51
    difference = (mean_blocks(image, 2)[..., 6:50, 10:-10] - mean_blocks(image, 0)[..., 8:52, 10:-10]) ** 2
    assert levels[2, 0] == pytest.approx(10 * np.log10(4 / difference.mean()), abs=1e-9)


def test_shift_equivariance_refuses_what_is_too_small():
    with pytest.raises(ValueError, match="shifts must name"):
        ShiftEquivariance(smooth, shifts=[])
    with pytest.raises(ValueError, match="more than 32 px"):
        ShiftEquivariance(smooth, shifts=[(8, 0)]).update(torch.zeros(1, 3, 32, 32))


def test_radial_spectrum_distance_of_scaled_spectra():
    real = make_fields(4, 64)
    metric = RadialSpectrumDistance(64)
    metric.update(real, real=True)
    metric.update(2 * real, real=False)
    for name, value in metric.compute().items():
        assert float(value) == pytest.approx(20 * np.log10(2), abs=1e-9), name
    # another number of images is no other power
    metric.update(2 * real.flip(0), real=False)
    assert float(metric.compute()["distance"]) == pytest.approx(20 * np.log10(2), abs=1e-9)


def test_radial_spectrum_distance_equals_numpy():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(3, 2, 32, 32)), rng.normal(size=(5, 2, 32, 32)).cumsum(-1)]
    metric = RadialSpectrumDistance(32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    rings = []
    for real, images in enumerate(sets):
        metric.update(torch.from_numpy(images), real=bool(real))
        centred = (images - images.mean((2, 3), keepdims=True)) * np.outer(window, window)
        power = (np.abs(np.fft.fft2(centred)) ** 2).mean((0, 1))
        ky, kx = (32 * f for f in frequencies(32))
        rings.append([power[np.abs(np.hypot(ky, kx) - k) < 0.5].mean() for k in range(1, 16)])
    level = 10 * np.log10(np.array(rings[0]) / np.array(rings[1]))
    result = metric.compute()
    assert float(result["distance"]) == pytest.approx(np.sqrt((level**2).mean()))
    for i, name in enumerate(("low", "mid", "high")):
        third = level[5 * i : 5 * i + 5]
        assert float(result[f"distance_{name}"]) == pytest.approx(np.sqrt((third**2).mean()))
        assert float(result[f"tilt_{name}"]) == pytest.approx(third.mean())


def test_radial_spectrum_needs_both_and_the_size():
    metric = RadialSpectrumDistance(32)
    metric.update(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), real=True)
    with pytest.raises(ValueError, match="generated and real"):
        metric.compute()
    with pytest.raises(ValueError, match="images must be"):
        metric.update(torch.rand(1, 3, 32, 16), real=True)
    with pytest.raises(ValueError, match="image_size must be even"):
        RadialSpectrumDistance(31)


def test_grid_artifact_of_noise_and_of_a_grid():
    noise = torch.randn(64, 1, 128, 128, generator=torch.Generator().manual_seed(0)).double()
    t = torch.arange(128, dtype=torch.float64)
    line = 0.3 * torch.cos(2 * torch.pi * t / 16)
    grid = line[:, None] + line
    levels = []
    for images in (noise, noise + grid):
        metric = GridArtifact(16, 128)
        for part in images.split(32):
            metric.update(part)
        levels.append(float(metric.compute()))
    assert levels[0] == pytest.approx(0, abs=0.3)
    # Under Hann, noise of variance 1 has power (3/8)^2 a bin. The grid puts amplitude 0.3 / 2 * N^2 times the window's
    # mean (1/2)^2 into four of the harmonics: power (0.15 / 4 * N)^2 each.
    k = 8 * np.arange(-8, 8)
    harmonics = (np.hypot(k[:, None], k[None, :]) <= 64).sum() - 1
    peak = (0.15 / 4 * 128) ** 2 / (3 / 8) ** 2
    assert levels[1] == pytest.approx(10 * np.log10(1 + 4 * peak / harmonics), abs=0.3)


def test_grid_artifact_equals_numpy():
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32))
    metric = GridArtifact(8, 32)
    metric.update(torch.from_numpy(x))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    centred = (x - x.mean((2, 3), keepdims=True)) * np.outer(window, window)
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean((0, 1))
    ratios = []
    for i in range(-16, 16, 4):
        for j in range(-16, 16, 4):
            r = np.hypot(i, j)
            if not 0 < r <= 16:
                continue
            ring = [
                power[a, b]
                for a in range(-16, 16)
                for b in range(-16, 16)
                if abs(np.hypot(a, b) - r) <= 1 and not ((a + 1) % 4 <= 2 and (b + 1) % 4 <= 2)
            ]
            ratios.append(power[i, j] / np.median(ring))
    assert float(metric.compute()) == pytest.approx(10 * np.log10(np.mean(ratios)), abs=1e-9)


def test_grid_artifact_checks_its_arguments():
    with pytest.raises(ValueError, match="4 strides"):
        GridArtifact(16, 56)
    with pytest.raises(ValueError, match="stride must be at least 2"):
        GridArtifact(1, 64)
    metric = GridArtifact(16, 64)
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="got none"):
        metric.compute()


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: AliasEnergyRatio(lambda v: F.avg_pool2d(v, 4), 4), {}),
        (lambda: ShiftEquivariance(smooth), {}),
        (lambda: RadialSpectrumDistance(64), {"real": False}),
        (lambda: GridArtifact(16, 64), {}),
    ],
)
def test_ranks_add_up(make, arguments):
    x = make_fields(5, 64)
    parts = [make() for _ in range(2)]
    whole = make()
    whole.update(x, **arguments)
    for metric, part in zip(parts, (x[:2], x[2:]), strict=True):
        metric.update(part, **arguments)
        if arguments:
            metric.update(part * 1.5 + part.roll(1, -1), real=True)
    if arguments:
        whole.update(x * 1.5 + x.roll(1, -1), real=True)
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute(), whole.compute(), rtol=1e-9, atol=1e-9)
