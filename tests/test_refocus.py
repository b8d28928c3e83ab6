"""Refocus against full-size blurring in float64, then sampling at the centres of the coarse pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.optics.psf import PSFS, make_psf, polygon_psf
from fvar_lightning.optics.refocus import Refocus, Views, decimate
from fvar_lightning.schedule import FocusSchedule

DEFAULT = FocusSchedule()
SMALL = FocusSchedule(patch_nums=(1, 2, 3, 4))
SCHEDULES = {
    "256": DEFAULT,
    "512": FocusSchedule(patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
    "1024": FocusSchedule(patch_nums=(1, 2, 3, 5, 9, 13, 21, 36, 48, 64)),
    "64 by 16": SMALL,
    "64 by 8": FocusSchedule(patch_nums=(1, 2, 3, 4, 6, 8), patch_size=8),
}


def noise(size: int, batch: int = 2, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(batch, channels, size, size, generator=generator, dtype=dtype) * 2 - 1


def blurred(images: Tensor, kernel: Tensor) -> Tensor:
    """Full-size convolution with reflect padding (conv2d correlates, hence the flip)."""
    margin = kernel.shape[-1] // 2
    planes = F.pad(images.flatten(0, 1)[:, None], (margin,) * 4, mode="reflect")
    return F.conv2d(planes, kernel.flip(0, 1)[None, None]).view_as(images)


def sampled(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=False)


def reference(images: Tensor, schedule: FocusSchedule, psf: str = "disk") -> Views:
    states = [blurred(images, make_psf(psf, radius, dtype=images.dtype)) for radius in schedule.state_radii]
    focused = [sampled(states[k], n) for k, n in zip(schedule.states, schedule.view_sizes, strict=True)]
    downsampled = [sampled(images, n) for n in schedule.view_sizes]
    return Views(focused, downsampled, [d - f for d, f in zip(downsampled, focused, strict=True)])


@pytest.mark.parametrize("psf", sorted(PSFS))
@pytest.mark.parametrize("radii", [(5.0, 1.0, 0.4, 0.0), (0.5, 0.3, 0.2, 0.0), (3.0, 2.0, 1.2, 0.0)], ids=str)
def test_sharp_scales_are_those_without_residual(psf: str, radii: tuple[float, ...]) -> None:
    """A disk of half a pixel, a Lanczos window of 1.2: no blur, though no radius of 0."""
    refocus = Refocus(FocusSchedule((1, 2, 3, 4), schedule=radii), psf)
    residuals = [bool(alias.abs().max() > 1e-9) for alias in refocus(noise(64)).alias]
    assert refocus.sharp_scales == residuals.count(False)
    assert residuals == sorted(residuals, reverse=True)


def largest_difference(first: Views, second: Views) -> float:
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def focused_pixel(plane: np.ndarray, kernel: np.ndarray, size: int, row: int, column: int) -> float:
    """One pixel of L by the definition: the sum over the window of each of the four neighbours, then their mean."""
    half = kernel.shape[0] // 2
    padded = np.pad(plane, half, mode="reflect") if half else plane
    side, value = plane.shape[0], 0.0
    y, x = ((i + 0.5) * side / size - 0.5 for i in (row, column))
    for i in (int(y), int(y) + 1):
        for j in (int(x), int(x) + 1):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            window = padded[i : i + 2 * half + 1, j : j + 2 * half + 1]
            value += weight * float((window * kernel).sum()) if weight else 0.0
    return value


@pytest.mark.parametrize("name", ["256", "64 by 16", "64 by 8"])
def test_agrees_with_blurring_at_full_size(name: str):
    schedule = SCHEDULES[name]
    images = noise(schedule.image_size, batch=1 if schedule.image_size == 256 else 3)
    expected = reference(images, schedule)
    assert largest_difference(Refocus(schedule)(images.float()), expected) < 2e-6
    assert largest_difference(Refocus(schedule)(images), expected) < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_agrees_with_the_definition_pixel_by_pixel(name: str):
    schedule = SCHEDULES[name]
    images = noise(schedule.image_size, batch=1, channels=1)
    views = Refocus(schedule)(images.float())
    rng = np.random.default_rng(0)
    for radius, size, view in zip(schedule.radii, schedule.view_sizes, views.focused, strict=True):
        kernel = make_psf("disk", radius, dtype=torch.float64).numpy()
        corners = [(0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1)]
        for row, column in corners + rng.integers(size, size=(12, 2)).tolist():
            expected = focused_pixel(images[0, 0].numpy(), kernel, size, row, column)
            assert float(view[0, 0, row, column]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", PSFS)
def test_every_psf_agrees_with_blurring_at_full_size(name: str):
    schedule = FocusSchedule(patch_nums=(1, 2, 3, 4), schedule="nyquist")
    images = noise(64)
    assert largest_difference(Refocus(schedule, name)(images), reference(images, schedule, name)) < 1e-12


def test_takes_a_function_and_convolves_rather_than_correlates():
    """A triangle is not its own mirror image."""

    def triangle(radius: float, *, dtype: torch.dtype) -> Tensor:
        return polygon_psf(radius, 3, dtype=dtype)

    images = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    images[..., 30, 20] = 1
    state = Refocus(SMALL, triangle).blur(images)[0]
    kernel = polygon_psf(3.0, 3, dtype=torch.float64)
    half = kernel.shape[-1] // 2
    point = state[0, 0, 30 - half : 31 + half, 20 - half : 21 + half]
    torch.testing.assert_close(point, kernel, atol=1e-15, rtol=0)
    assert not torch.allclose(kernel, kernel.flip(1))


def test_alias_is_downsampled_minus_focused_to_the_bit():
    views = Refocus(DEFAULT)(noise(256, dtype=torch.float32))
    assert [len(view) for view in views] == [10, 10, 10]
    for focused, downsampled, alias in zip(*views, strict=True):
        assert torch.equal(alias, downsampled - focused)
    assert all(bool(alias.any()) for alias in views.alias[:-1])
    assert not views.alias[-1].any()


def test_without_blur_there_is_no_alias():
    images = noise(64)
    refocus = Refocus(SMALL, "none")
    assert all(torch.equal(state, images) for state in refocus.blur(images))
    assert not any(alias.any() for alias in refocus(images).alias)


def test_focus_states_at_full_size():
    images = noise(256, batch=1)
    refocus = Refocus(DEFAULT)
    states = refocus.blur(images)
    assert len(states) == 4
    assert states[-1] is images
    for radius, state in zip(DEFAULT.state_radii, states, strict=True):
        expected = blurred(images, make_psf("disk", radius, dtype=torch.float64))
        torch.testing.assert_close(state, expected, atol=1e-12, rtol=0)
    assert largest_difference(refocus.views(images, states), refocus(images)) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 24, 25, 41, 47, 48])
def test_decimation_is_bilinear_interpolation_without_a_prefilter(size: int):
    images = noise(48)
    torch.testing.assert_close(decimate(images, size), sampled(images, size), atol=1e-13, rtol=0)


def test_decimation_refuses_to_enlarge():
    for images, size in ((noise(8), 9), (noise(8), 0), (noise(8)[..., :4], 2)):
        with pytest.raises(ValueError, match=f"size must lie in 1..H.*got {size}"):
            decimate(images, size)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_has_the_same_views_in_any_batch(channels: int):
    images = noise(64, batch=5, channels=channels, dtype=torch.float32)
    refocus = Refocus(SMALL)
    assert largest_difference(refocus(images[2:3]), Views(*[[v[2:3] for v in vs] for vs in refocus(images)])) == 0
    for channel in range(channels):
        alone = refocus(images[:, channel : channel + 1])
        together = Views(*[[v[:, channel : channel + 1] for v in vs] for vs in refocus(images)])
        assert largest_difference(alone, together) < 1e-6


def test_gradient_flows():
    images = noise(64, batch=1).requires_grad_()
    refocus = Refocus(SMALL)
    weights = [noise(n, batch=1) for n in SMALL.view_sizes]
    with torch.inference_mode():
        refocus(images)  # what this leaves behind must not stop the backward pass

    def loss(views: Views) -> Tensor:
        return torch.stack([(w * a**2).sum() for w, a in zip(weights, views.alias, strict=True)]).sum()

    (found,) = torch.autograd.grad(loss(refocus(images)), images)
    (expected,) = torch.autograd.grad(loss(reference(images, SMALL)), images)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_autocast_and_half_precision_compute_in_float32():
    images = noise(64, dtype=torch.float32)
    refocus = Refocus(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest_difference(refocus(images), refocus(images.clone())) == 0
        assert largest_difference(refocus(images), reference(images.double(), SMALL)) < 2e-6
    halves = refocus.bfloat16()(images.bfloat16())
    assert {v.dtype for vs in halves for v in vs} == {torch.bfloat16}
    assert largest_difference(halves, reference(images.bfloat16().double(), SMALL)) < 0.02
    assert largest_difference(refocus(images), reference(images.double(), SMALL)) < 2e-6


@pytest.mark.parametrize("shape", [(1, 3, 64, 32), (1, 3, 128, 128), (3, 64, 64)])
def test_wrong_sizes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"\(B, C, 64, 64\).*{shape[-1]}\)"):
        Refocus(SMALL)(torch.zeros(shape))


def test_bad_psfs_are_refused():
    with pytest.raises(ValueError, match=r"psf must be one of disk.*'box'"):
        Refocus(SMALL, "box")
    wide = FocusSchedule(patch_nums=(1, 2, 3, 4), max_radius=31)
    with pytest.raises(ValueError, match=r"'lanczos' reaches 76 px at radius 31.*63 px at most"):
        Refocus(wide, "lanczos")
