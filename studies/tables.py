"""Tables of figures over seeds."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_1samp

from fvar_lightning.atomic import replacing

Figures = Mapping[int, Mapping[str, float]]
"""The figures of every seed."""


def values(found: Figures, figure: str) -> list[float]:
    """Of the seeds that have it."""
    return [figures[figure] for figures in found.values() if figure in figures]


def spread(found: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not found:
        return "-"
    deviation = f" ± {stdev(found):.2g}" if len(found) > 1 else ""
    return f"{mean(found):.4g}{deviation}"


def differences(found: Figures, baseline: Figures, figure: str) -> list[float]:
    """To the baseline, seed by seed, where both have it."""
    both = [seed for seed in found if seed in baseline and figure in found[seed] and figure in baseline[seed]]
    return [found[seed][figure] - baseline[seed][figure] for seed in both]


def paired(found: Sequence[float]) -> str:
    """Mean of differences and its standard error; bold where `p_value` is below 5 %: of three seeds that is beyond 4.3
    standard errors, of six beyond 2.6."""
    if not found:
        return "-"
    if len(found) == 1:
        return f"{found[0]:+.3g}"
    middle, error = mean(found), stdev(found) / len(found) ** 0.5
    text = f"{middle:+.3g} ± {error:.2g}"
    return f"**{text}**" if p_value(found) < 0.05 else text


def p_value(found: Sequence[float]) -> float:
    """What Student's t finds for differences as large as these if there is none; NaN of fewer than two."""
    return float(ttest_1samp(found, 0.0).pvalue) if len(found) > 1 else float("nan")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Whole or not at all."""
    with replacing(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
