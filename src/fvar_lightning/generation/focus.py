"""Any focus between the trained states: f_hat between two of them.

After the last scale of a focus state with radius rho_k, f_hat stands for the image blurred by rho_k; training decodes
it against just that. Between two states it is interpolated with weights linear in the squared radius: what blurs of
rho_a and rho_b mix to has then the second moment of the radius asked for (a disk's is rho^2 / 4 along each axis).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fvar_lightning.schedule import FocusSchedule


class Between(NamedTuple):
    """Which two stages make a focus radius."""

    blurred: int
    """Scale whose stage is at least as blurred as asked for."""
    sharper: int
    """Scale whose stage is at most as blurred."""
    weight: float
    """Of the blurred one, in [0, 1]."""


def between(schedule: FocusSchedule, focus: float) -> Between:
    """The last scales of the two focus states around a radius in pixels at full resolution.

    Raises:
        ValueError: if the radius is not in 0..the schedule's largest.
    """
    radii = schedule.state_radii
    if not 0 <= focus <= radii[0]:
        raise ValueError(f"focus must lie in 0..{radii[0]:g} pixels, the radii of the schedule, got {focus}")
    state = max(k for k, radius in enumerate(radii) if radius >= focus)
    last = schedule.last_scales
    if radii[state] == focus:
        return Between(last[state], last[state], 1.0)
    most, least = radii[state] ** 2, radii[state + 1] ** 2
    return Between(last[state], last[state + 1], (focus**2 - least) / (most - least))


def refocused(stages: Iterable[Tensor], schedule: FocusSchedule, focus: float) -> Tensor:
    """f_hat (B, Z, h, w) at a focus radius, from f_hat after every scale (`sample`, `MultiScaleQuantizer.stages`).

    Reads the stages no further than it needs.

    Raises:
        ValueError: if the radius is not in 0..the schedule's largest.
    """
    place = between(schedule, focus)
    for scale, f_hat in enumerate(stages):
        if scale == place.blurred:
            blurred = f_hat
        if scale == place.sharper:
            return torch.lerp(f_hat, blurred, place.weight)
    raise ValueError(f"stages must hold f_hat after each of the {place.sharper + 1} scales a focus of {focus} px reads")
