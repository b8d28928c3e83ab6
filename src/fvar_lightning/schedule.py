"""FocusSchedule: which scales there are, how their tokens are laid out, and how sharp each of them is.

Legend: S scales, K focus states, L tokens in all scales together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

VAR_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

ALIAS_FREE_RATIO = 1.22
"""A disk's first spectral zero lies at 0.61 / radius, the Nyquist limit at 0.5 / factor: alias-free from
1.22 factors."""


@dataclass(frozen=True)
class FocusSchedule:
    """Token layout and defocus radii of a next-focus pyramid (paper section 3.2, eq. 1-2).

    Scale ``s`` is a token map of side ``patch_nums[s]``; its view measures ``patch_nums[s] * patch_size`` pixels a
    side. The last of ``focus_states`` states is sharp and belongs to the last scale alone; the blurred ones are shared
    evenly among the scales before it.

    Args:
        patch_nums: side of every token map, strictly increasing.
        patch_size: pixels a token covers at the side of its own view; the tokenizer's down-sampling factor.
        focus_states: K, the number of blur levels, from 1 (everything sharp: plain VAR) to S (a radius for each scale).
        max_radius: radius of the first state in pixels at full resolution; ``None`` is 12/256 of the image side.
        schedule: ``cosine``: ``max_radius * (1 + cos(pi (k-1)/(K-1))) / 2``, our reading of eq. 2; ``linear``;
            ``nyquist``: 1.22 times the scale's down-sampling factor, the smallest disk whose first spectral zero lies
            at the Nyquist limit (needs ``focus_states`` = S); or K radii, decreasing to 0. The last two take no
            ``max_radius``.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    patch_nums: tuple[int, ...] = VAR_PATCH_NUMS
    patch_size: int = 16
    focus_states: int = 4
    max_radius: float | None = None
    schedule: Literal["cosine", "linear", "nyquist"] | tuple[float, ...] = "cosine"

    @classmethod
    def of(cls, value: "FocusSchedule | dict[str, Any]") -> "FocusSchedule":
        """The schedule itself, or one from the plain dictionary a checkpoint keeps."""
        return value if isinstance(value, cls) else cls(**value)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", tuple(self.schedule))
        increasing = all(a < b for a, b in pairwise(self.patch_nums))
        if not self.patch_nums or self.patch_nums[0] < 1 or not increasing:
            raise ValueError(f"patch_nums must be strictly increasing positive integers, got {self.patch_nums}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be a positive integer, got {self.patch_size}")
        if not 1 <= self.focus_states <= self.num_scales:
            raise ValueError(f"focus_states must lie in 1..{self.num_scales} (the scales), got {self.focus_states}")
        if self.max_radius is not None and not 0 <= self.max_radius < self.image_size / 2:
            raise ValueError(f"max_radius must lie in [0, {self.image_size / 2}) pixels, got {self.max_radius}")
        if self.schedule == "nyquist":
            if self.focus_states != self.num_scales:
                raise ValueError(
                    "schedule 'nyquist' gives every scale its own radius: "
                    f"focus_states must be {self.num_scales}, got {self.focus_states}"
                )
        elif isinstance(self.schedule, str):
            if self.schedule not in ("cosine", "linear"):
                raise ValueError(
                    f"schedule must be 'cosine', 'linear', 'nyquist' or a list of radii, got {self.schedule!r}"
                )
        else:
            self._check_radii(self.schedule)
        if self.max_radius is not None and self.schedule not in ("cosine", "linear"):
            raise ValueError(
                f"schedule {self.schedule!r} gives the radii itself: max_radius must be None, got {self.max_radius}"
            )

    def _check_radii(self, radii: Sequence[float]) -> None:
        falling = all(a > b for a, b in pairwise(radii))
        if len(radii) != self.focus_states or not falling or radii[-1] != 0 or radii[0] >= self.image_size / 2:
            raise ValueError(
                f"schedule must list {self.focus_states} radii (focus_states) below {self.image_size / 2} px, "
                f"strictly decreasing to 0, got {list(radii)}"
            )

    @property
    def num_scales(self) -> int:
        """S."""
        return len(self.patch_nums)

    @property
    def image_size(self) -> int:
        """Side of the full image in pixels."""
        return self.patch_nums[-1] * self.patch_size

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Side of every scale's view in pixels."""
        return tuple(n * self.patch_size for n in self.patch_nums)

    @property
    def factors(self) -> tuple[float, ...]:
        """Down-sampling factor of every scale: full side over the side of its view."""
        return tuple(self.patch_nums[-1] / n for n in self.patch_nums)

    @property
    def state_radii(self) -> tuple[float, ...]:
        """Radius of each of the K focus states, in pixels at full resolution."""
        last = self.focus_states - 1
        if self.schedule == "nyquist":
            return (*(ALIAS_FREE_RATIO * f for f in self.factors[:-1]), 0.0)
        if not isinstance(self.schedule, str):
            return tuple(float(r) for r in self.schedule)
        if last == 0:
            return (0.0,)
        first = 12 / 256 * self.image_size if self.max_radius is None else self.max_radius
        if self.schedule == "linear":
            return tuple(first * (last - k) / last for k in range(last + 1))
        blurred = (round(first * (1 + math.cos(math.pi * k / last)) / 2, 9) for k in range(last))
        return (*blurred, 0.0)

    @property
    def states(self) -> tuple[int, ...]:
        """Focus state (0-based) of every scale: floor(i (K-1) / (S-1))."""
        if self.num_scales == 1:
            return (self.focus_states - 1,)
        return tuple(i * (self.focus_states - 1) // (self.num_scales - 1) for i in range(self.num_scales))

    @property
    def last_scales(self) -> tuple[int, ...]:
        """Last scale (0-based) of each of the K focus states: what is decoded after it shows the state."""
        states = self.states
        return tuple(max(s for s, state in enumerate(states) if state == k) for k in range(self.focus_states))

    @property
    def radii(self) -> tuple[float, ...]:
        """Radius of every scale, in pixels at full resolution."""
        return tuple(self.state_radii[k] for k in self.states)

    @property
    def alias_free(self) -> tuple[bool, ...]:
        """Whether the disk of every scale has its first spectral zero at or below the scale's Nyquist limit."""
        pairs = zip(self.radii, self.factors, strict=True)
        return tuple(f == 1 or r >= ALIAS_FREE_RATIO * f for r, f in pairs)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where every scale's tokens lie in the sequence."""
        slices, start = [], 0
        for n in self.patch_nums:
            slices.append(slice(start, start + n * n))
            start += n * n
        return tuple(slices)

    @property
    def first_length(self) -> int:
        """Tokens of the first scale."""
        return self.patch_nums[0] ** 2

    @property
    def length(self) -> int:
        """L, tokens of all scales."""
        return sum(n * n for n in self.patch_nums)

    def level_ids(self, device: torch.device | str | None = None) -> Tensor:
        """Scale of every token: LongTensor (L,)."""
        counts = torch.tensor([n * n for n in self.patch_nums], device=device)
        # with output_size: works on the meta device, and no GPU has to be asked for the sum
        return torch.repeat_interleave(torch.arange(self.num_scales, device=device), counts, output_size=self.length)

    def block_causal_mask(self, device: torch.device | str | None = None) -> Tensor:
        """(L, L) bool, true where the row's token may read the column's: same scale or an earlier one."""
        levels = self.level_ids(device)
        return levels[:, None] >= levels[None, :]
