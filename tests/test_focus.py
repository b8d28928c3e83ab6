"""Any focus between the trained states, and guidance schedules."""

import pytest
import torch
from torch import Tensor

from fvar_lightning.generation.focus import between, refocused
from fvar_lightning.generation.guidance import constant, interval, ramp
from fvar_lightning.generation.sampling import generate, generate_stages, guidance_scales
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR

SCHEDULE = FocusSchedule((1, 2, 3, 4, 6, 8), patch_size=8, focus_states=4, max_radius=5.0)


def images(size: int) -> Tensor:
    """Four with the spectrum of photographs, 1 / f."""
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = (f[:, None].square() + f.square()).sqrt().clamp_min(1 / size)
    noise = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    return x / x.abs().max()


def detail(x: Tensor) -> float:
    """Root mean square of the differences between neighbours."""
    return float((x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean()).sqrt())


def ideal_stages(x: Tensor, schedule: FocusSchedule) -> list[Tensor]:
    """What perfect tokenizers and decoders would show after every scale: the image blurred to the scale's state."""
    blurred = Refocus(schedule).blur(x)
    return [blurred[state] for state in schedule.states]


def test_trained_states_are_met_exactly() -> None:
    stages = [torch.full((1, 1, 2, 2), float(s)) for s in range(6)]
    for state, radius in enumerate(SCHEDULE.state_radii):
        assert torch.equal(refocused(stages, SCHEDULE, radius), stages[SCHEDULE.last_scales[state]])


def test_second_moment_is_that_of_the_radius_asked_for() -> None:
    """Of the images of a point, about their centre: r^2 / 4 along each axis, as a disk of radius r has."""
    schedule = FocusSchedule((1, 2, 3, 4), patch_size=16, max_radius=6.0)
    point = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    point[..., 32, 32] = 1
    stages = ideal_stages(point, schedule)
    squared = (torch.arange(64, dtype=torch.float64) - 32).square()

    def moment(x: Tensor) -> float:
        return float((x * squared).sum())

    # a disk drawn on pixels has a second moment that is off by a fraction of a pixel's own
    off = max(abs(moment(stage) - r**2 / 4) for stage, r in zip(stages, schedule.radii, strict=True))
    assert off < 0.11
    for radius in (6.0, 5.5, 4.6, 3.0, 2.0, 1.6, 1.0, 0.3, 0.0):
        assert moment(refocused(stages, schedule, radius)) == pytest.approx(radius**2 / 4, abs=off)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_blur_is_monotone_and_close_to_the_true_one(kind: str) -> None:
    """With an ideal decoder: less and less detail as the radius grows, and nearer to the truth than either state."""
    schedule = FocusSchedule((1, 2, 3, 4, 6, 8), patch_size=8, focus_states=4, max_radius=5.0, schedule=kind)
    x = images(64)
    stages = ideal_stages(x, schedule)
    radii = torch.linspace(0, 5, 41).tolist()
    details = [detail(refocused(stages, schedule, r)) for r in radii]
    assert details == sorted(details, reverse=True)
    assert details[0] / details[-1] > 3
    for a, b in zip(schedule.state_radii[:-1], schedule.state_radii[1:], strict=True):
        middle = (a + b) / 2
        truth = Refocus(FocusSchedule((4, 8), patch_size=8, focus_states=2, schedule=[middle, 0.0])).blur(x)[0]
        place = between(schedule, middle)
        made = refocused(stages, schedule, middle)
        for scale in (place.blurred, place.sharper):
            assert (made - truth).square().mean() < (stages[scale] - truth).square().mean()


def test_stages_are_read_no_further_than_needed() -> None:
    read = []

    def stages():
        for s in range(6):
            read.append(s)
            yield torch.zeros(1)

    refocused(stages(), SCHEDULE, 2.0)
    # states are [0, 0, 1, 1, 2, 3] with radii 5, 3.75, 1.25, 0
    assert read == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"stages must hold .* 5 scales"):
        refocused([torch.zeros(1)] * 4, SCHEDULE, 2.0)


def test_generation_at_any_focus() -> None:
    vae = VQVAE(SCHEDULE, vocab_size=12, z_channels=4, ch=16, ch_mult=(1, 1, 1, 2), num_res_blocks=1).eval()
    var = VAR(SCHEDULE.patch_nums, vocab_size=12, z_channels=4, num_classes=5, depth=1, width=32, heads=2).eval()
    labels, seeds = torch.tensor([0, 3]), [1, 2]
    stages = generate_stages(var, vae, labels, seeds=seeds)
    assert torch.equal(generate(var, vae, labels, seeds=seeds, focus=0.0), generate(var, vae, labels, seeds=seeds))
    for radius, scale in ((5.0, 1), (3.75, 3), (1.25, 4), (0.0, 5)):
        torch.testing.assert_close(generate(var, vae, labels, seeds=seeds, focus=radius), stages[scale])
    # continuous: a small step of the radius is a small step of the image, across a state too
    steps = [generate(var, vae, labels, seeds=seeds, focus=r) for r in (3.74, 3.75, 3.76)]
    span = (stages[3] - stages[1]).abs().max()
    assert 0 < (steps[0] - steps[1]).abs().max() < 0.1 * span
    assert 0 < (steps[1] - steps[2]).abs().max() < 0.1 * span


@pytest.mark.parametrize("focus", [5.1, -0.1, float("nan")])
def test_focus_beyond_the_schedule_is_refused(focus: float) -> None:
    with pytest.raises(ValueError, match=rf"focus must lie in 0\.\.5 pixels.* got {focus}"):
        between(SCHEDULE, focus)


def test_without_focus_states_only_the_sharp_image_exists() -> None:
    plain = FocusSchedule((1, 2, 4), patch_size=4, focus_states=1)
    assert between(plain, 0.0) == (2, 2, 1.0)
    with pytest.raises(ValueError, match=r"focus must lie in 0\.\.0 pixels"):
        between(plain, 0.5)


def test_guidance_schedules() -> None:
    assert ramp(3, 4) == [0, 1, 2, 3] == guidance_scales(3, 4)
    assert ramp(3, 1) == [3.0], "the last scale of one"
    assert constant(2, 3) == [2, 2, 2]
    assert interval(2, 5, 1, 3) == [0, 2, 2, 0, 0]
    assert guidance_scales(interval(2, 5, 1, 3), 5) == [0, 2, 2, 0, 0]
    for start, stop in ((-1, 2), (2, 2), (0, 6)):
        with pytest.raises(ValueError, match=f"start < stop <= 5, got {start} and {stop}"):
            interval(1, 5, start, stop)
