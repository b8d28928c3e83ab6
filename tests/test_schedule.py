"""FocusSchedule against counts and radii worked out by hand."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from fvar_lightning.schedule import VAR_PATCH_NUMS, FocusSchedule


def test_default_is_the_paper_at_256_pixels():
    schedule = FocusSchedule()
    assert schedule.image_size == 256
    assert schedule.length == 680
    assert schedule.view_sizes == (16, 32, 48, 64, 80, 96, 128, 160, 208, 256)
    assert schedule.state_radii == (12, 9, 3, 0)
    assert schedule.states == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3)
    assert schedule.last_scales == (2, 5, 8, 9)
    assert schedule.radii == (12, 12, 12, 9, 9, 9, 3, 3, 3, 0)
    assert schedule.factors == tuple(16 / n for n in VAR_PATCH_NUMS)


def test_radius_scales_with_the_image():
    assert FocusSchedule(patch_nums=(1, 2, 3, 4)).state_radii == (3, 2.25, 0.75, 0)
    assert FocusSchedule(patch_nums=(2, 4, 8, 16)).radii == (12, 9, 3, 0)
    assert FocusSchedule(max_radius=8).state_radii == (8, 6, 2, 0)


def test_linear_nyquist_and_listed_radii():
    assert FocusSchedule(schedule="linear").state_radii == pytest.approx((12, 8, 4, 0))
    nyquist = FocusSchedule(patch_nums=(2, 4, 8, 16), schedule="nyquist")
    assert nyquist.radii == pytest.approx((1.22 * 8, 1.22 * 4, 1.22 * 2, 0))
    assert FocusSchedule(schedule=[20.0, 5.0, 0.5, 0.0]).radii == (20, 20, 20, 5, 5, 5, 0.5, 0.5, 0.5, 0)


def test_equal_schedules_are_equal_and_hash_alike_however_their_numbers_were_given():
    given = FocusSchedule([1, 2, 4], focus_states=3, schedule=[2.0, 1.0, 0.0])
    assert given == FocusSchedule((1, 2, 4), focus_states=3, schedule=(2.0, 1.0, 0.0))
    assert len({given, FocusSchedule.of(asdict(given)), FocusSchedule((1, 2, 4), focus_states=3)}) == 2


def test_every_scale_can_have_its_own_radius_or_none_a_blur():
    own = FocusSchedule(focus_states=10)
    assert own.states == tuple(range(10))
    assert own.radii == pytest.approx([6 * (1 + math.cos(math.pi * k / 9)) for k in range(10)], abs=1e-8)
    assert FocusSchedule(focus_states=1).radii == (0,) * 10
    assert FocusSchedule(patch_nums=(4,), focus_states=1).radii == (0,)


@pytest.mark.parametrize("focus_states", range(2, 11))
def test_sharp_state_belongs_to_the_last_scale_alone(focus_states: int):
    states = FocusSchedule(focus_states=focus_states).states
    assert states.count(focus_states - 1) == 1
    assert sorted(states) == list(states)
    shares = [states.count(k) for k in range(focus_states - 1)]
    assert max(shares) - min(shares) <= 1


def test_alias_free_scales_are_those_whose_disk_has_its_zero_below_nyquist():
    # 1.22 s is 19.5, 9.8, 6.5, 4.9, 3.9, 3.3, 2.4, 2.0, 1.5 for the ten scales
    assert FocusSchedule().alias_free == (False, *[True] * 9)
    assert all(FocusSchedule(focus_states=10, schedule="nyquist").alias_free)
    assert FocusSchedule(focus_states=1).alias_free == (*[False] * 9, True)


def test_tokens_are_laid_out_scale_after_scale():
    schedule = FocusSchedule(patch_nums=(1, 2, 4), focus_states=2)
    assert schedule.slices == (slice(0, 1), slice(1, 5), slice(5, 21))
    assert schedule.first_length == 1
    assert schedule.length == 21
    levels = schedule.level_ids()
    assert levels.dtype == torch.int64
    assert levels.tolist() == [0] + [1] * 4 + [2] * 16


def test_mask_lets_a_token_read_its_own_and_earlier_scales():
    schedule = FocusSchedule(patch_nums=(1, 2, 4), focus_states=2)
    mask = schedule.block_causal_mask()
    assert mask.dtype == torch.bool
    for scale, rows in enumerate(schedule.slices):
        readable = sum(n * n for n in schedule.patch_nums[: scale + 1])
        assert mask[rows, :readable].all()
        assert not mask[rows, readable:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_nums": ()}, r"patch_nums.*got \(\)"),
        ({"patch_nums": (0, 1, 2, 3)}, r"patch_nums.*got \(0, 1, 2, 3\)"),
        ({"patch_nums": (1, 2, 2, 4)}, r"patch_nums.*got \(1, 2, 2, 4\)"),
        ({"patch_size": 0}, "patch_size.*got 0"),
        ({"focus_states": 0}, r"focus_states.*1\.\.10.*got 0"),
        ({"focus_states": 11}, r"focus_states.*1\.\.10.*got 11"),
        ({"max_radius": -1}, r"max_radius.*\[0, 128.*got -1"),
        ({"max_radius": 128}, r"max_radius.*\[0, 128.*got 128"),
        ({"schedule": "cubic"}, "schedule.*cosine.*got 'cubic'"),
        ({"schedule": "nyquist", "focus_states": 10, "max_radius": 12.0}, "schedule 'nyquist'.*max_radius.*got 12.0"),
        ({"schedule": [3.0, 2.0, 1.0, 0.0], "max_radius": 3.0}, r"schedule \(3.0, .*max_radius.*got 3.0"),
        ({"schedule": "nyquist"}, "nyquist.*focus_states must be 10, got 4"),
        ({"schedule": [3.0, 0.0]}, r"schedule must list 4 radii.*got \[3.0, 0.0\]"),
        ({"schedule": [3.0, 4.0, 1.0, 0.0]}, "schedule.*strictly decreasing to 0.*4.0"),
        ({"schedule": [3.0, 2.0, 1.0, 0.5]}, "schedule.*strictly decreasing to 0.*0.5"),
        ({"schedule": [128.0, 2.0, 1.0, 0.0]}, "schedule.*below 128.* px.*128.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FocusSchedule(**arguments)
