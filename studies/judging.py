"""Figures of images and of trained students, by plain calls."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fvar_lightning import VAR, VQVAE, FVARTask, generate
from fvar_lightning.callbacks.reconstruction import high_band_ratio
from fvar_lightning.data.pixels import to_uint8, to_unit_range
from fvar_lightning.data.token_dataset import TokenDataset
from fvar_lightning.metrics.extractors import EfficientNetLite0
from fvar_lightning.metrics.generation import frechet_distance, kernel_distance, precision_recall
from fvar_lightning.metrics.spectra import GridArtifact, RadialSpectrumDistance
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics
from fvar_lightning.transformer.losses import token_cross_entropy

BATCH = 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def statistics_of(images: Tensor) -> Statistics:
    """Of images (N, 3, H, W) uint8, on the CPU."""
    extractor = EfficientNetLite0().to(DEVICE)
    found = FeatureStatistics(extractor.name, extractor.num_features, images.shape[-1])
    for part in tqdm(images.split(BATCH), "features", leave=False):
        found.update(*(None if x is None else x.cpu() for x in extractor(part.to(DEVICE))))
    return found.compute()


def distances(made: Statistics, true: Statistics, name: str) -> dict[str, float]:
    """Frechet distance, and 1000 times the kernel distance."""
    subset = min(1000, made.count or 0, true.count or 0)
    return {
        f"fd/{name}": frechet_distance(made, true),
        f"kd/{name}": 1000 * kernel_distance(made, true, subset_size=subset)[0],
    }


def likeness(made: Statistics, real: Statistics) -> dict[str, float]:
    """Precision and recall."""
    return dict(zip(("precision", "recall"), precision_recall(made, real), strict=True))


def detail(images: Tensor, real: Tensor, stride: int) -> dict[str, float]:
    """Spectral distance and tilt by thirds of the band, power in the high band, and the grid, all in dB."""
    spectrum, grid = RadialSpectrumDistance(images.shape[-1]), GridArtifact(stride, images.shape[-1])
    for part in images.split(BATCH):
        spectrum.update(to_unit_range(part), real=False)
        grid.update(to_unit_range(part))
    for part in real.split(BATCH):
        spectrum.update(to_unit_range(part), real=True)
    values = {f"spectrum/{name}": float(value) for name, value in spectrum.compute().items()}
    return values | {"high_band": float(high_band_ratio(spectrum)), "grid": float(grid.compute())}


@torch.no_grad()
def reconstructions(vae: VQVAE, images: Tensor) -> Tensor:
    """What is left of images (N, 3, H, W) uint8 on their way through tokens."""
    vae, made = vae.to(DEVICE), []
    for part in tqdm(images.split(BATCH), "reconstructions", leave=False):
        made.append(to_uint8(vae.decode(vae.encode(vae.inputs(to_unit_range(part.to(DEVICE)))))).cpu())
    return torch.cat(made)


def samples(var: VAR, vae: VQVAE, count: int, first_seed: int, **sampling: Any) -> Tensor:
    """(count, 3, H, W) uint8, equally many of each class; image i has the same label and noise for every student."""
    var, vae, made = var.to(DEVICE), vae.to(DEVICE), []
    for part in tqdm(torch.arange(count).split(BATCH), "samples", leave=False):
        labels = (part * var.num_classes // count).to(DEVICE)
        images = generate(var, vae, labels, seeds=(first_seed + part).tolist(), **sampling)
        made.append(to_uint8(images).cpu())
    return torch.cat(made)


@torch.no_grad()
def cross_entropies(var: VAR, vae: VQVAE, cache: Path, limit: int) -> dict[str, float]:
    """Of held-out tokens in nats, by scale and over all."""
    var, vae, tokens = var.to(DEVICE), vae.to(DEVICE), TokenDataset(cache)
    sums = torch.zeros(var.layout.length, dtype=torch.float64)
    rows = range(min(limit, len(tokens)))
    for start in range(0, len(rows), BATCH):
        batch = tokens.collate([tokens[i] for i in rows[start : start + BATCH]])
        structure = [part.to(DEVICE) for part in batch.structure]
        trace = var.trace(batch.labels.to(DEVICE), vae.var_inputs(structure))
        readout = var.readout(trace.hidden[-1], trace.condition)
        sums += token_cross_entropy(torch.cat(structure, dim=1), readout).double().sum(0).cpu()
    means = sums / len(rows)
    scales = zip(var.layout.patch_nums, var.layout.slices, strict=True)
    return {f"cross_entropy/{n}x{n}": float(means[part].mean()) for n, part in scales} | {
        "cross_entropy/all": float(means.mean())
    }


def codes_in_use(vocab_size: int, patch_nums: Sequence[int], cache: Path, limit: int) -> dict[str, float]:
    """Perplexity of the held-out tokens (as many codes used evenly would have it), by scale and over all."""
    tokens = TokenDataset(cache)
    structure = torch.stack([tokens[i][0] for i in range(min(limit, len(tokens)))])
    parts = {
        f"{n}x{n}": part for n, part in zip(patch_nums, structure.split([n * n for n in patch_nums], 1), strict=True)
    }
    found = {}
    for name, part in (parts | {"all": structure}).items():
        shares = part.flatten().bincount(minlength=vocab_size) / part.numel()
        found[f"codes/{name}"] = float(torch.special.entr(shares.double()).sum().exp())
    return found


def seconds_per_step(task: FVARTask, cache: Path, batch_size: int, steps: int = 15) -> float:
    """Median time of a training step: of the CPU, which does not count what others run beside it; on a GPU, of the
    clock."""
    tokens = TokenDataset(cache)
    task = task.to(DEVICE).train()
    batch = tokens.collate([tokens[i % len(tokens)] for i in range(batch_size)])
    batch = type(batch)(*([x.to(DEVICE) for x in part] for part in batch[:2]), batch.labels.to(DEVICE))
    optimizer = task.optimizer_factory(task.parameters_to_train())
    clock, spent = (time.process_time if DEVICE.type == "cpu" else time.perf_counter), []
    for _ in range(steps):
        start = clock()
        optimizer.zero_grad()
        task.losses(batch, torch.Generator(DEVICE).manual_seed(0))["loss"].backward()
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        spent.append(clock() - start)
    return median(spent[len(spent) // 3 :])


def settling(points: Sequence[tuple[int, float]]) -> float:
    """By which part of itself a curve of (step, value) still moved in the last quarter of its steps."""
    if len(points) < 2:
        return float("nan")
    last, end = points[-1]
    before = min(points, key=lambda point: abs(point[0] - 0.75 * last))[1]
    return (before - end) / end
