"""How a step of stage 2 grows with tokens and depth: measured, and by `fvar plan`.

    python studies/growth.py [--rounds 3] [--plot growth.png]

A plain step of one image, width 256, in float32 on one thread. `studies/speed.py` prints the same table.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rows import TINY, print_head, print_row, seconds
from speed_models import stage2_kept, stage2_step, student_of

from fvar_lightning.planning.cost import step_cost

CASES = [(256, 4), (256, 8)] if TINY else [(256, 4), (256, 8), (256, 16), (512, 4), (1024, 4)]
"""Pixels and depth."""


class Growth(NamedTuple):
    """A row of the table; memory in MiB."""

    tokens: int
    depth: int
    seconds: float
    gflop: float
    kept: float
    planned: float


def growth(rounds: int) -> list[Growth]:
    """Print time and kept memory of a plain step over tokens and depth, beside what `fvar plan` counts."""
    columns = ("pixels", "tokens", "depth", "seconds", "GFLOP by `fvar plan`", "GFLOP/s", "MiB kept", "by `fvar plan`")
    print_head("Growth of a plain stage-2 step, batch 1, width 256", *columns)
    measured = []
    for pixels, depth in CASES:
        with torch.device("meta"):
            task = student_of(pixels, depth)
        planned = step_cost(task, None, 1, None)
        run, kept = stage2_step(TINY, 1, "plain", False, (pixels, depth)), stage2_kept(pixels, depth)
        run()
        time = statistics.median(seconds(run) for _ in range(rounds))
        case = Growth(task.student.layout.length, depth, time, planned.flops / 1e9, kept / 2**20, planned.kept / 2**20)
        measured.append(case)
        work = (f"{time:.2f}", f"{case.gflop:.1f}", f"{case.gflop / time:.0f}")
        print_row(pixels, case.tokens, depth, *work, f"{case.kept:.0f}", f"{case.planned:.0f}")
    return measured


def plot(cases: Sequence[Growth], path: Path) -> None:
    """Time beside planned work at the first case's speed, and kept memory beside planned."""
    figure, first = Figure(figsize=(9, 6), layout="constrained"), cases[0]
    rate = first.gflop / first.seconds
    along = {
        "tokens": [case for case in cases if case.depth == first.depth],
        "depth": [case for case in cases if case.tokens == first.tokens],
    }
    for row, (axis, chosen) in enumerate(along.items()):
        x = [getattr(case, axis) for case in chosen]
        pairs = {
            "seconds a step": ([c.seconds for c in chosen], [c.gflop / rate for c in chosen]),
            "MiB kept": ([c.kept for c in chosen], [c.planned for c in chosen]),
        }
        for column, (name, (found, planned)) in enumerate(pairs.items()):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            axes.loglog(x, found, "o", label="measured")
            axes.loglog(x, planned, "-", label="fvar plan", zorder=0)
            axes.set(xlabel=axis, ylabel=name)
            axes.minorticks_off()
            axes.set_xticks(x, [str(value) for value in x])
            axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print, and draw where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1 if TINY else 3)
    parser.add_argument("--plot", type=Path, help="a picture file for the curves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = growth(options.rounds)
    if options.plot is not None:
        plot(measured, options.plot)


if __name__ == "__main__":
    main()
