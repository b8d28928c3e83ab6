"""Refocus against the plain way: for every scale a full-size convolution with its disk, then interpolation."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from size import TINY
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.optics.psf import disk_psf
from fvar_lightning.optics.refocus import Refocus, Views
from fvar_lightning.schedule import FocusSchedule


def plain_views(images: Tensor, schedule: FocusSchedule) -> Views:
    """All views with one full-size convolution per blurred scale."""
    focused, downsampled = [], []
    for radius, side in zip(schedule.radii, schedule.view_sizes, strict=True):
        kernel = disk_psf(radius, dtype=images.dtype)
        margin = kernel.shape[-1] // 2
        planes = F.pad(images.flatten(0, 1)[:, None], (margin,) * 4, mode="reflect")
        blurred = F.conv2d(planes, kernel[None, None]).view_as(images) if radius else images
        focused.append(F.interpolate(blurred, (side, side), mode="bilinear", align_corners=False))
        downsampled.append(F.interpolate(images, (side, side), mode="bilinear", align_corners=False))
    return Views(focused, downsampled, [d - f for d, f in zip(downsampled, focused, strict=True)])


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.benchmark
@pytest.mark.usefixtures("one_thread")
def test_refocus_is_at_least_15_times_faster_than_full_size_blurring():
    schedule = FocusSchedule()
    refocus = Refocus(schedule)
    images = torch.rand(1 if TINY else 8, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        for ours, theirs in zip(refocus(images).focused, plain_views(images, schedule).focused, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        # Interleaved, so that both meet the same load
        times = [
            (seconds(lambda: refocus(images)), seconds(lambda: plain_views(images, schedule)))
            for _ in range(1 if TINY else 9)
        ]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = theirs / ours
    print(
        f"\n{len(images)} images of 256 px, ten scales, one thread: Refocus {ours * 1e3:.1f} ms, "
        f"full-size blurring {theirs * 1e3:.1f} ms, {ratio:.1f} times faster"
    )
    assert TINY or ratio >= 15
