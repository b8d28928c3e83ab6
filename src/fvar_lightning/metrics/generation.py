"""Figures of generated images from the statistics of two sets: Frechet and kernel distance, Inception Score, P and R.

Frechet distance is ours, since it works from sums, and so is the kernel distance, whose subsets share their kernel
matrices here; the others are torch-fidelity's own computations on kept features.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from fvar_lightning.metrics.statistics import Statistics


def _comparable(generated: Statistics, real: Statistics) -> None:
    for name in ("extractor", "image_size"):
        ours, theirs = getattr(generated, name), getattr(real, name)
        if ours != theirs and None not in (ours, theirs):
            raise ValueError(f"real: its {name} is {theirs!r}, but that of the generated images is {ours!r}")
    if generated.mean.shape != real.mean.shape:
        raise ValueError(f"real: it has {len(real.mean)} features, the generated images have {len(generated.mean)}")


def _kept(statistics: Statistics, argument: str) -> Tensor:
    if statistics.features is None:
        raise ValueError(f"{argument}: these statistics keep no features, which this figure is computed of")
    return statistics.features


def frechet_distance(generated: Statistics, real: Statistics) -> float:
    """||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al. 2017, eq. 6), in float64.

    The trace of the root is taken of S_1^(1/2) S_2 S_1^(1/2), which has the same eigenvalues and is symmetric.

    Raises:
        ValueError: statistics of another extractor or resolution.
    """
    _comparable(generated, real)
    mean, covariance = real.mean.to(generated.mean), real.covariance.to(generated.covariance)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ generated.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (generated.mean - mean).square().sum() + generated.covariance.trace() + covariance.trace() - 2 * cross
    return float(distance)


def kernel_distance(
    generated: Statistics, real: Statistics, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and deviation over subsets of the unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    The subsets are those that torch-fidelity draws for the seed; computed in float64.

    Raises:
        ValueError: statistics of another extractor or resolution, without features, or of fewer than `subset_size`.
    """
    _comparable(generated, real)
    ours, theirs = _kept(generated, "generated"), _kept(real, "real")
    if not 2 <= subset_size <= min(len(ours), len(theirs)):
        raise ValueError(
            f"subset_size must lie in 2..{min(len(ours), len(theirs))} (the smaller set), got {subset_size}"
        )
    draw = np.random.RandomState(seed)
    picks = [draw.choice(len(f), subset_size, replace=False) for _ in range(subsets) for f in (ours, theirs)]
    x, y = ours, theirs.to(ours)
    in_x, in_y = torch.from_numpy(np.stack(picks)).to(x.device).view(subsets, 2, subset_size).unbind(1)
    within = sum(_kernel_sums(f, f, chosen, chosen) - _diagonal_sums(f, chosen) for f, chosen in ((x, in_x), (y, in_y)))
    across = _kernel_sums(x, y, in_x, in_y)
    distances = within / (subset_size * (subset_size - 1)) - 2 * across / subset_size**2
    return float(distances.mean()), float(distances.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) float64."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def _diagonal_sums(x: Tensor, chosen: Tensor) -> Tensor:
    """Sum of k(x_i, x_i) over every subset, (S, n) indices -> (S,)."""
    return ((x.double().square().sum(1) / x.shape[1] + 1) ** 3)[chosen].sum(1)


def _kernel_sums(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, block: int = 1024) -> Tensor:
    """Sum of k(x_i, y_j) over every subset's pairs, (S, n) indices each -> (S,).

    From one kernel matrix of all pairs, in blocks of rows, unless the subsets' own matrices are smaller together.
    """
    if len(x) * len(y) > rows.numel() * columns.shape[1]:
        return torch.stack([_kernel(x[i], y[j]).sum() for i, j in zip(rows, columns, strict=True)])
    in_x, in_y = (
        torch.zeros(len(chosen), len(f), dtype=torch.float64, device=x.device).scatter_(1, chosen, 1.0)
        for f, chosen in ((x, rows), (y, columns))
    )
    blocks = (slice(start, start + block) for start in range(0, len(x), block))
    return torch.stack([((in_x[:, part] @ _kernel(x[part], y)) * in_y).sum(1) for part in blocks]).sum(0)


def precision_recall(
    generated: Statistics, real: Statistics, neighbours: int = 3, batch_size: int = 5000
) -> tuple[float, float]:
    """Precision: share of generated images within the k-th neighbour's distance of a real one; recall the reverse.

    Kynkaanniemi et al. 2019, eq. 1-2, `neighbours` being their k. Distances are computed in blocks of
    `batch_size` x N on the features' device.

    Raises:
        ValueError: statistics of another extractor or resolution, without features, or of too few images.
    """
    _comparable(generated, real)
    ours, theirs = _kept(generated, "generated"), _kept(real, "real")
    if not 1 <= neighbours < min(len(ours), len(theirs)):
        raise ValueError(f"neighbours must lie in 1..{min(len(ours), len(theirs)) - 1}, got {neighbours}")
    values = prc_features_to_metric(
        ours,
        theirs.to(ours),
        prc_neighborhood=neighbours,
        prc_batch_size=batch_size,
        save_cpu_ram=True,
        verbose=False,
    )
    return values["precision"], values["recall"]


def inception_score(generated: Statistics, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and deviation over splits of exp E KL(p(y|x) || p(y)) (Salimans et al. 2016).

    Raises:
        ValueError: statistics without logits, or of fewer images than splits.
    """
    if generated.logits is None:
        raise ValueError("generated: these statistics keep no logits, which the Inception Score is computed of")
    if not 1 <= splits <= len(generated.logits):
        raise ValueError(f"splits must lie in 1..{len(generated.logits)} (the images), got {splits}")
    values = isc_features_to_metric(generated.logits, splits=splits, shuffle=True, rng_seed=seed)
    return values["inception_score_mean"], values["inception_score_std"]


@dataclass
class Figures:
    """Figures by name, and what a reader must know of them."""

    values: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def generation_figures(generated: Statistics, real: Statistics, neighbours: int = 3, seed: int = 2020) -> Figures:
    """All figures that the statistics allow, named after their extractor.

    With Inception: ``fid_inception``, ``kid_inception``, ``is_inception``, ``precision_inception``,
    ``recall_inception``. With any other extractor ``fd_<name>``, ``kd_<name>``, ``is_<name>``, ...: not FID.

    Args:
        generated, real: of the same extractor and resolution.
        neighbours: k of precision and recall.
        seed: of the shuffling before the inception score's splits.

    Raises:
        ValueError: statistics of another extractor or resolution.
    """
    name = generated.extractor
    frechet, kernel = ("fid", "kid") if name == "inception" else ("fd", "kd")
    result = Figures({f"{frechet}_{name}": frechet_distance(generated, real)})
    for argument, statistics in (("generated", generated), ("real", real)):
        if statistics.count is not None and statistics.count <= len(statistics.mean):
            result.warnings.append(
                f"{statistics.count} {argument} images for {len(statistics.mean)} features: the covariance is singular "
                f"and {frechet}_{name} strongly biased; compare it with nothing of another number of images"
            )
    if generated.features is not None and real.features is not None:
        smaller = min(len(generated.features), len(real.features))
        subset = min(1000, smaller)
        if subset < 1000:
            result.warnings.append(f"{kernel}_{name} on subsets of {subset} images instead of the usual 1000")
        distance, deviation = kernel_distance(generated, real, subset_size=subset, seed=seed)
        result.values |= {f"{kernel}_{name}": distance, f"{kernel}_std_{name}": deviation}
        if smaller > neighbours:
            precision, recall = precision_recall(generated, real, neighbours)
            result.values |= {f"precision_{name}": precision, f"recall_{name}": recall}
        else:
            result.warnings.append(f"no precision and recall: {smaller} images for {neighbours} neighbours")
    else:
        result.warnings.append(f"no {kernel}, precision and recall: one of the sets keeps no features")
    if generated.logits is not None:
        splits = min(10, len(generated.logits))
        score, deviation = inception_score(generated, splits, seed)
        result.values |= {f"is_{name}": score, f"is_std_{name}": deviation}
    return result
