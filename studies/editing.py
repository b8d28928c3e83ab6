"""Compares ours and VAR's way of editing on the validation images of a folder, unconditional, with one trained model.

    python studies/editing.py --checkpoint quickstart/fvar/last.ckpt --images path/of/scenes128 --output editing

Prints a Markdown table and writes results.json and a picture for every mask into the output folder. Every row is kept
as soon as it is done: the same command goes on where it was stopped.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args

import torch
from tables import markdown
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from fvar_lightning import VAR, VQVAE, ImageDataModule, generate
from fvar_lightning.atomic import write_json
from fvar_lightning.data.pixels import to_uint8, to_unit_range
from fvar_lightning.generation.editing import Method, composite, edit, fill_hole
from fvar_lightning.metrics.extractors import EfficientNetLite0
from fvar_lightning.metrics.generation import frechet_distance
from fvar_lightning.metrics.pictures import tile
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint

LEVEL = 127.5
"""Eight-bit levels in a unit of our images."""

PICTURES = 6

Edit = Callable[[Tensor, Tensor, list[int]], Tensor]
"""(images (B, 3, H, W), hole (B, 1, H, W), seeds) -> the edited images."""


def square(size: int, seed: int) -> Tensor:
    """(H, W): the middle quarter."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[size // 4 : size - size // 4, size // 4 : size - size // 4] = True
    return mask


def half(size: int, seed: int) -> Tensor:
    """(H, W): the right half."""
    return (torch.arange(size) >= size // 2).expand(size, size)


def blobs(size: int, seed: int) -> Tensor:
    """(H, W): the top 40 % of smooth noise."""
    noise = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    height = F.interpolate(noise, (size, size), mode="bicubic")[0, 0]
    return height > height.quantile(0.6)


MASKS = {"square": square, "blobs": blobs, "half": half}


def ways(var: VAR, vae: VQVAE) -> dict[str, Edit]:
    """What is compared: both methods with feathers of 0, a token and the whole hole; and two that keep no token."""

    def by(method: Method, feather: int) -> Edit:
        def way(images: Tensor, hole: Tensor, seeds: list[int]) -> Tensor:
            return edit(var, vae, images, hole, method=method, feather=feather, seeds=seeds)

        return way

    def nothing_forced(images: Tensor, hole: Tensor, seeds: list[int]) -> Tensor:
        generated = generate(var, vae, torch.full((len(images),), var.num_classes), seeds=seeds)
        return composite(images, generated, hole, token)

    def smooth_fill(images: Tensor, hole: Tensor, seeds: list[int]) -> Tensor:
        return fill_hole(images, hole)

    token = vae.schedule.patch_size
    made = {
        f"{method}, feather {feather}": by(method, feather)
        for feather in (token, 0, vae.schedule.image_size)
        for method in get_args(Method)
    }
    return made | {f"nothing forced, feather {token}": nothing_forced, "smooth fill alone": smooth_fill}


def border_steps(images: Tensor, hole: Tensor) -> Tensor:
    """Differences of all neighbouring pixels of which one lies in the hole, any number of them: (N,)."""
    hole = hole.expand_as(images)
    return torch.cat([images.diff(dim=d)[hole.diff(dim=d)] for d in (-2, -1)])


@torch.no_grad()
def measure(way: Edit, mask: str, images: Tensor, real: Statistics, extractor: EfficientNetLite0, batch: int) -> dict:
    """A row of the table, over all images (N, 3, H, W) uint8."""
    statistics = FeatureStatistics(extractor.name, extractor.num_features, images.shape[-1], keep_features=False)
    ours, theirs = [], []
    seconds = 0.0
    for start in tqdm(range(0, len(images), batch), desc=mask, leave=False):
        original = to_unit_range(images[start : start + batch])
        seeds = list(range(start, start + len(original)))
        hole = torch.stack([MASKS[mask](images.shape[-1], seed) for seed in seeds])[:, None]
        begin = perf_counter()
        edited = way(original, hole, seeds)
        seconds += perf_counter() - begin
        ours.append(border_steps(edited, hole))
        theirs.append(border_steps(original, hole))
        statistics.update(*extractor(to_uint8(edited)))
    made, true = torch.cat(ours), torch.cat(theirs)
    return {
        "seam_error": LEVEL * float((made - true).abs().mean()),
        "seam_ratio": float(made.abs().mean() / true.abs().mean()),
        f"fd_{extractor.name}": frechet_distance(statistics.compute(), real),
        "seconds_per_image": seconds / len(images),
    }


def validation_images(data: ImageDataModule, limit: int | None) -> Tensor:
    """(N, 3, H, W) uint8, at most `limit` of them, in an order that mixes the classes."""
    dataset: Any = cast(DataLoader, data.val_dataloader()).dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([dataset[i][0] for i in order[:limit]])


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    figures = list(next(iter(rows.values())))
    cells = [[*name.split(": "), *(f"{row[figure]:.3g}" for figure in figures)] for name, row in rows.items()]
    return markdown(["mask", "way", *figures], cells)


def picture(mask: str, made: dict[str, Edit], images: Tensor, path: Path) -> None:
    """A row of every way on the first few images."""
    original = to_unit_range(images[:PICTURES])
    seeds = list(range(len(original)))
    hole = torch.stack([MASKS[mask](images.shape[-1], seed) for seed in seeds])[:, None]
    rows = {"original": original, "kept": original.masked_fill(hole, 1.0)}
    rows |= {name: way(original, hole, seeds) for name, way in made.items()}
    tile([list(row) for row in rows.values()], list(rows), side=128).save(path)


def main(args: Sequence[str] | None = None) -> str:
    """Runs what is missing, and returns the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of a FVARTask; its structure tokenizer is in it")
    parser.add_argument("--images", required=True, help="folder of images, with val in it or not")
    parser.add_argument("--output", default="editing", type=Path)
    parser.add_argument("--limit", type=int, help="so many images at most")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args(args)

    var, vae, _ = load_fvar_checkpoint(options.checkpoint)
    data = ImageDataModule(options.images, image_size=vae.schedule.image_size, schedule=vae.schedule, num_workers=0)
    images = validation_images(data, options.limit)
    settings = {
        "checkpoint": [options.checkpoint, Path(options.checkpoint).stat().st_mtime],
        "images": [options.images, len(images)],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        parser.error(f"--output {options.output} holds results of {results['settings']}, not of {settings}")

    extractor = EfficientNetLite0()
    statistics = FeatureStatistics(extractor.name, extractor.num_features, images.shape[-1], keep_features=False)
    for part in tqdm(images.split(options.batch_size), desc="originals", leave=False):
        statistics.update(*extractor(part))
    real = statistics.compute()
    made = ways(var, vae)
    for mask in MASKS:
        for name, way in made.items():
            if f"{mask}: {name}" not in results["rows"]:
                row = measure(way, mask, images, real, extractor, options.batch_size)
                results["rows"][f"{mask}: {name}"] = row
                write_json(path, results)
        if not (drawn := options.output / f"{mask}.png").is_file():
            picture(mask, made, images, drawn)
    return table(results["rows"])


if __name__ == "__main__":
    print(main())
