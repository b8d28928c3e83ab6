"""What the ablation writes of its figures: tables, a CSV of everything, plots, and picture sheets."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from arms import ARMS
from matplotlib.figure import Figure
from tables import Figures, differences, markdown, paired, spread, values, write_csv

from fvar_lightning.atomic import replacing
from fvar_lightning.data.pixels import to_unit_range
from fvar_lightning.metrics.pictures import Curve, line_chart, tile

Results = Mapping[str, Figures]
"""Figures of arms (or tokenizers), by seed."""

MAIN = {
    "fd/real": "Frechet distance to real images",
    "fd/reconstructions": "to reconstructions",
    "kd/real": "kernel distance to real, 1e-3",
    "kd/reconstructions": "to reconstructions, 1e-3",
    "precision": "precision",
    "recall": "recall",
    "grid": "grid, dB",
    "high_band": "high band, dB",
}
DETAIL = {
    f"spectrum/{figure}_{part}": f"{title}, {third} third, dB"
    for figure, title in {"distance": "spectrum", "tilt": "tilt"}.items()
    for part, third in {"low": "coarsest", "mid": "middle", "high": "finest"}.items()
}
BUDGET = {
    "steps": "steps",
    "seconds_per_step": "seconds a step",
    "wall_clock": "wall clock, s",
    "settled": "moved in the last quarter",
}


def overview(results: Results, baselines: Sequence[str], columns: Mapping[str, str]) -> str:
    """Number of seeds, mean and deviation of every arm, and below each the paired differences to the baselines that
    stand above it."""
    rows, above = [], []
    for arm, found in results.items():
        rows.append([f"`{arm}`", str(len(found)), *(spread(values(found, figure)) for figure in columns)])
        for baseline in above:
            both = sum(seed in results[baseline] for seed in found)
            cells = (paired(differences(found, results[baseline], figure)) for figure in columns)
            rows.append([f"to `{baseline}`", str(both), *cells])
        above += [arm] if arm in baselines else []
    return markdown(["", "seeds", *columns.values()], rows)


def by_scale(results: Results, figure: str) -> str:
    """A figure of every scale, of the arms that have it."""
    names = dict.fromkeys(name for found in results.values() for figures in found.values() for name in figures)
    columns = [name for name in names if name.startswith(f"{figure}/")]
    rows = [[f"`{arm}`", *(spread(values(found, name)) for name in columns)] for arm, found in results.items()]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    return markdown(["", *(name.partition("/")[2] for name in columns)], rows)


def same_tokens(results: Results) -> dict[str, Results]:
    """The arms that share their structure tokens, whose cross-entropies compare, by tokens."""
    groups: dict[str, dict[str, Figures]] = {}
    for arm, found in results.items():
        groups.setdefault(ARMS[arm].tokens, {})[arm] = found
    return groups


def text(budgets: Mapping[str, Results], tokenizers: Results, baseline: str) -> str:
    """The tables in Markdown."""
    shown = {figure: title for figure, title in MAIN.items() if "reconstructions" not in figure}
    parts = [
        "Mean ± standard deviation over seeds; below it the mean paired difference to "
        f"`{baseline}`, or to its tokenizer, ± its standard error, bold where Student's t finds less than 5 %.",
        "## Reconstructions of the held-out images",
        overview(tokenizers, [ARMS[baseline].tokens], shown | DETAIL),
    ]
    for budget, results in budgets.items():
        title = f"Equal {budget}" if budget in ("steps", "time") else f"Equal steps, {budget}"
        parts += [f"## {title}", overview(results, [baseline], MAIN), overview(results, [baseline], DETAIL),
                  overview(results, [], BUDGET)]  # fmt: skip
    results = budgets["steps"]
    for tokens, group in same_tokens(results).items():
        parts += [f"## Held-out cross-entropy, nats a token: tokens `{tokens}`, differences to the first arm",
                  by_scale(group, "cross_entropy"),
                  overview(group, [next(iter(group))], {"cross_entropy/all": "all"})]  # fmt: skip
    for figure, title in (
        ("teacher_gap", "Teacher's gap, nats a token"),
        ("teacher_gap_shuffled", "Its control with shuffled alias tokens"),
        ("teacher_gate", "Mean gate"),
    ):
        parts += [f"## {title}", by_scale(results, figure)]
    return "\n\n".join(parts) + "\n"


RUN = ("kind", "name", "seed")


def write_figures(path: Path, kinds: Mapping[str, Results]) -> None:
    """Every figure of every run, a line a run, by kind: a budget, with its arms, or "tokenizers"."""
    runs = [
        ((kind, name, seed), figures)
        for kind, results in kinds.items()
        for name, found in results.items()
        for seed, figures in found.items()
    ]
    columns = list(dict.fromkeys(figure for _, figures in runs for figure in figures))
    cells = [[f"{figures[c]:.6g}" if c in figures else "" for c in columns] for _, figures in runs]
    write_csv(path, [*RUN, *columns], [[*run, *row] for (run, _), row in zip(runs, cells, strict=True)])


def read_figures(path: Path) -> dict[str, dict[str, dict[int, dict[str, float]]]]:
    """What `write_figures` wrote."""
    kinds: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            kind, name, seed = (row.pop(column) for column in RUN)
            figures = {figure: float(value) for figure, value in row.items() if value}
            kinds.setdefault(kind, {}).setdefault(name, {})[int(seed)] = figures
    return kinds


def plot_arms(path: Path, results: Results, baseline: str) -> None:
    """Every seed a dot, the mean with its standard error, for the figures that matter most."""
    columns = [figure for figure in MAIN if any(values(found, figure) for found in results.values())][:4]
    figure = Figure(figsize=(3.6 * len(columns), 1.2 + 0.34 * len(results)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, columns, strict=True):
        for row, found in enumerate(results.values()):
            dots = values(found, name)
            error = stdev(dots) / len(dots) ** 0.5 if len(dots) > 1 else 0.0
            axis.plot(dots, [row] * len(dots), ".", color="0.7")
            if dots:
                axis.errorbar(mean(dots), row, xerr=error, fmt="o", color="C0", capsize=3, markersize=4)
        if baseline in results and values(results[baseline], name):
            axis.axvline(mean(values(results[baseline], name)), color="0.8", zorder=0)
        axis.set_title(MAIN[name], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def plot_gaps(path: Path, results: Results) -> None:
    """The teacher's gap over scales, with its control, of every arm that has a teacher: means over seeds."""
    panels: dict[str, dict[str, Curve]] = {}
    for arm, found in results.items():
        names = [n for n in next(iter(found.values()), {}) if n.startswith("teacher_gap/") and not n.endswith("/all")]
        for figure in ("teacher_gap", "teacher_gap_shuffled") if names else ():
            scales = [name.replace("teacher_gap/", f"{figure}/") for name in names]
            points = [(s + 1.0, mean(values(found, name) or [float("nan")])) for s, name in enumerate(scales)]
            panels.setdefault(figure, {})[arm] = points
    if panels:
        with replacing(path) as beside:
            line_chart(panels, "scale").save(beside, format="PNG")


def plot_learning(path: Path, curves: Mapping[str, Curve]) -> None:
    """Held-out cross-entropy of the students of one seed over the steps."""
    with replacing(path) as beside:
        line_chart({"Held-out nats a token": curves}, "step").save(beside, format="PNG")


def write_sheet(path: Path, arms: Mapping[str, Path], count: int = 12, side: int = 80) -> None:
    """Samples of every arm below each other, evenly spaced over classes; a column has one label and noise."""
    rows = []
    for file in arms.values():
        with np.load(file) as content:
            images = torch.from_numpy(content["images"])
        chosen = [i * len(images) // min(count, len(images)) for i in range(min(count, len(images)))]
        rows.append(list(to_unit_range(images[chosen])))
    with replacing(path) as beside:
        tile(rows, list(arms), side=side).save(beside, format="PNG")
