"""Point-spread functions against dense supersampling, SciPy and the analytic transfer functions, in float64."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from PIL import Image
from torch import Tensor

from fvar_lightning.optics.psf import (
    PSFS,
    disk_psf,
    disk_transfer,
    gaussian_psf,
    gaussian_transfer,
    lanczos_psf,
    make_psf,
    polygon_psf,
    transfer_function,
)

F64 = torch.float64
RADII = (0.0, 0.36, 1.4, 12.0, 19.5)
SAMPLES = 200
"""Sub-pixels a side per pixel of the reference; its own error is below 1 in 1000 of a pixel."""


def sub_pixels(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the sub-pixel centres of an n x n kernel, the origin in its middle: columns, rows."""
    axis = (np.arange(n * SAMPLES) + 0.5) / SAMPLES - n / 2
    return axis[None, :], axis[:, None]


def coverage(inside: np.ndarray) -> Tensor:
    n = inside.shape[0] // SAMPLES
    return torch.from_numpy(inside.reshape(n, SAMPLES, n, SAMPLES).mean(axis=(1, 3)))


def second_moment(psf: Tensor) -> float:
    x = torch.arange(psf.shape[-1], dtype=psf.dtype) - psf.shape[-1] // 2
    return float((psf.sum(0) * x**2).sum())


@pytest.mark.parametrize("name", PSFS)
@pytest.mark.parametrize("radius", RADII)
def test_kernels_are_odd_squares_that_sum_to_one(name: str, radius: float):
    for dtype, tolerance in ((torch.float32, 1e-6), (F64, 1e-14)):
        psf = make_psf(name, radius, dtype=dtype)
        assert psf.dtype == dtype
        assert psf.shape[0] == psf.shape[1]
        assert psf.shape[0] % 2 == 1
        assert abs(float(psf.double().sum()) - 1) < tolerance


@pytest.mark.parametrize("name", PSFS)
def test_radius_zero_is_the_identity(name: str):
    assert make_psf(name, 0.0).tolist() == [[1.0]]


@pytest.mark.parametrize("radius", [0.36, 0.5, 0.6, 1.4, 12.0, 19.5])
def test_disk_weights_are_the_covered_areas(radius: float):
    psf = disk_psf(radius, dtype=F64)
    x, y = sub_pixels(psf.shape[-1])
    area = coverage(x**2 + y**2 <= radius**2)
    assert (psf * math.pi * radius**2 - area).abs().max() < 1e-3
    assert bool((psf >= 0).all())
    assert bool((psf[area == 0] < 1e-5).all())
    away = np.maximum(np.abs(np.arange(len(psf)) - len(psf) // 2) - 0.5, 0)  # of a pixel's nearest side, per axis
    assert torch.equal(psf > 0, torch.from_numpy(np.hypot(away[None, :], away[:, None]) < radius))


@pytest.mark.parametrize("make", [disk_psf, polygon_psf])
def test_a_pixel_wholly_covered_weighs_one_over_the_area(make):
    psf = make(12.0, dtype=F64)
    torch.testing.assert_close(psf[9:16, 9:16], torch.full((7, 7), 1 / (math.pi * 144), dtype=F64), atol=0, rtol=1e-13)


@pytest.mark.parametrize("radius", [0.36, 1.4, 12.0, 19.5])
def test_disk_spectrum_is_the_airy_pattern_times_the_pixel(radius: float):
    """Sampling the disk averaged over pixels repeats its spectrum 2 J1(z)/z sinc(f) at every whole frequency."""
    frequency = np.linspace(0, 0.5, 101)
    repeats = frequency[:, None] + np.arange(-4000, 4001)
    z = 2 * np.pi * radius * np.where(repeats == 0, 1, repeats)
    airy = np.where(repeats == 0, 1, 2 * scipy.special.j1(z) / z)
    expected = (airy * np.sinc(repeats)).sum(1)
    found = transfer_function(disk_psf(radius, dtype=F64), torch.from_numpy(frequency))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if radius >= 12:  # below the first zero the repeats hardly matter: the continuous formula is what is left
        passed = frequency <= 0.61 / radius
        continuous = disk_transfer(radius, torch.from_numpy(frequency)) * torch.from_numpy(np.sinc(frequency))
        np.testing.assert_allclose(found[passed], continuous[passed], atol=2e-4)


def test_analytic_transfer_functions_agree_with_scipy():
    frequency = torch.linspace(-0.5, 0.5, 201, dtype=F64)
    z = 2 * np.pi * 12 * frequency.numpy()
    airy = np.divide(2 * scipy.special.j1(z), z, out=np.ones_like(z), where=z != 0)
    np.testing.assert_allclose(disk_transfer(12.0, frequency), airy, atol=1e-7)  # what torch's J1 is good for
    assert disk_transfer(0.0, frequency).tolist() == [1.0] * 201
    # a unit pixel hardly changes a Gaussian of sigma 6
    numeric = transfer_function(gaussian_psf(12.0, dtype=F64), frequency)
    pixel = torch.from_numpy(np.sinc(frequency.numpy()))
    torch.testing.assert_close(numeric, gaussian_transfer(12.0, frequency) * pixel, atol=1e-6, rtol=0)


def test_first_zero_of_the_disk_is_at_nyquist_for_a_radius_of_1_22_factors():
    before, after = disk_transfer(1.22 * 8, torch.tensor([0.5 / 8 * 0.998, 0.5 / 8 * 1.002], dtype=F64)).tolist()
    assert before > 0 > after


@pytest.mark.parametrize("radius", [0.36, 1.4, 12.0])
def test_gaussian_is_integrated_over_pixels(radius: float):
    psf = gaussian_psf(radius, dtype=F64)
    half = psf.shape[-1] // 2
    weights = np.diff(scipy.stats.norm(scale=radius / 2).cdf(np.arange(-half, half + 2) - 0.5))
    np.testing.assert_allclose(psf, np.outer(weights, weights), atol=2e-6 * weights.max() ** 2)


@pytest.mark.parametrize("radius", [3.0, 9.0, 12.0, 19.5])
def test_gaussian_has_the_second_moment_of_the_disk(radius: float):
    pixel = 1 / 12  # a pixel's own second moment
    assert second_moment(gaussian_psf(radius, dtype=F64)) == pytest.approx(radius**2 / 4 + pixel, rel=1e-4)
    assert second_moment(disk_psf(radius, dtype=F64)) == pytest.approx(radius**2 / 4 + pixel, rel=0.015)


@pytest.mark.parametrize(
    ("radius", "blades", "rotation"), [(0.36, 6, 0.0), (1.4, 3, 0.2), (12.0, 6, 0.0), (12.0, 5, 0.3), (19.5, 8, 1.0)]
)
def test_polygon_weights_are_the_covered_areas(radius: float, blades: int, rotation: float):
    psf = polygon_psf(radius, blades, rotation, dtype=F64)
    x, y = sub_pixels(psf.shape[-1])
    apothem = radius * math.sqrt(math.pi / (blades * math.tan(math.pi / blades)))
    inside = np.ones(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for k in range(blades):
        normal = rotation + 2 * math.pi * (k + 0.5) / blades
        inside &= x * math.cos(normal) + y * math.sin(normal) <= apothem
    assert (psf * math.pi * radius**2 - coverage(inside)).abs().max() < 3e-3


def test_polygon_of_many_blades_is_a_disk():
    torch.testing.assert_close(polygon_psf(12.0, 5000, dtype=F64)[1:-1, 1:-1], disk_psf(12.0, dtype=F64)[1:-1, 1:-1])


def test_square_aperture_is_exact():
    """Four blades turned by 45 degrees: the square of side 12 sqrt(pi), whose border covers 0.135 of a pixel."""
    side = 12 * math.sqrt(math.pi)
    psf = polygon_psf(12.0, 4, math.pi / 4, dtype=F64)
    border = (side - 21) / 2
    profile = torch.tensor([border] + [1.0] * 21 + [border], dtype=F64)
    torch.testing.assert_close(psf, profile[:, None] * profile[None, :] / side**2, atol=1e-16, rtol=1e-10)


@pytest.mark.parametrize("factor", [3, 5])
def test_lanczos_is_pillows(factor: int):
    pixels = np.random.default_rng(0).random((factor * 15, factor * 15), dtype=np.float32)
    resized = np.asarray(Image.fromarray(pixels).resize((15, 15), Image.Resampling.LANCZOS))
    psf = lanczos_psf(1.22 * factor, dtype=F64).numpy()
    half, centre = psf.shape[0] // 2, factor * 7 + factor // 2
    window = slice(centre - half, centre + half + 1)
    assert (pixels[window, window] * psf).sum() == pytest.approx(resized[7, 7], abs=1e-6)
    assert lanczos_psf(1.22).tolist() == [[1.0]]


@pytest.mark.parametrize("radius", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("name", PSFS)
def test_bad_radii_are_refused(name: str, radius: float):
    with pytest.raises(ValueError, match=f"radius.*got {radius}"):
        make_psf(name, radius)


def test_bad_names_and_blades_are_refused():
    with pytest.raises(ValueError, match=r"psf must be one of disk, gaussian.*got 'box'"):
        make_psf("box", 3.0)
    with pytest.raises(ValueError, match="blades must be at least 3, got 2"):
        polygon_psf(3.0, blades=2)
