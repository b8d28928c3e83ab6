"""Strengths of classifier-free guidance at every scale, for `generate(..., guidance=...)`.

With strength t logits are (1 + t) conditional - t unconditional: 0 is no guidance. A list holds one for each scale.
"""


def ramp(strength: float, num_scales: int) -> list[float]:
    """From 0 at the first scale, evenly, to `strength` at the last: VAR's, and what a plain number means."""
    if num_scales == 1:
        return [float(strength)]
    return [strength * s / (num_scales - 1) for s in range(num_scales)]


def constant(strength: float, num_scales: int) -> list[float]:
    """The same strength at every scale."""
    return [float(strength)] * num_scales


def interval(strength: float, num_scales: int, start: int, stop: int) -> list[float]:
    """`strength` at the scales start..stop-1, none at the others (after Kynkaanniemi et al. 2024, arXiv 2404.07724).

    The scales from `stop` on cost half of what they would with guidance.

    Raises:
        ValueError: unless 0 <= start < stop <= num_scales.
    """
    if not 0 <= start < stop <= num_scales:
        raise ValueError(f"start and stop must satisfy 0 <= start < stop <= {num_scales}, got {start} and {stop}")
    return [float(strength) if start <= s < stop else 0.0 for s in range(num_scales)]
