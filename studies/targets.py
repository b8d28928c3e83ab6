"""Compares the three targets of the structure tokenizer, at the quickstart's sizes and with the same budget.

    python studies/targets.py scenes128 --images path/of/scenes128 --output targets
    python studies/targets.py FashionMNIST --images path/of/fashion_mnist --output targets

For every target and seed: a structure tokenizer, its figures on the validation images, a student alone (no teacher) on
its tokens, and the Frechet distance of what that generates to the validation images. Beside them the same autoencoder
without a quantiser, `view` without its texture loss, and the alias tokenizer. Prints Markdown tables. Every step is
kept as soon as it is done: the same command goes on where it was stopped, and two with different --seeds may run at
once.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sets import NETWORKS, QUICKSTART, SETS, images_of
from tables import markdown, spread
from torch.utils.data import DataLoader, Subset

from fvar_lightning.atomic import write_json
from fvar_lightning.cli import configs
from fvar_lightning.cli import main as run
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.metrics.extractors import EfficientNetLite0
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics
from fvar_lightning.quickstart import train

TARGETS = ("view", "full", "feature")
OF_VIEW = {
    "unquantised": ["--model.warmup_steps=1000000"],
    "no_texture": ["--model.texture_weight=0"],
}
"""Variants of `view`, and their arguments."""
VARIANTS = (*TARGETS, *OF_VIEW, "alias")
GENERATED, REAL = 640, 1000
"""Images, at most. Fewer than the extractor's features: the Frechet distances compare among themselves only."""

SHOWN = {
    "tokenizer psnr": "PSNR, dB",
    "tokenizer ssim": "SSIM",
    "tokenizer high_band": "high band, dB",
    "tokenizer grid/reconstructed": "grid artefact, dB",
    "tokenizer fd_": "reconstructions: Frechet distance, ",
    "tokenizer focus_psnr/": "PSNR at focus state ",
    "tokenizer usage/": "usage ",
    "tokenizer snr/": "SNR, dB, ",
    "student fd_": "generated: Frechet distance, ",
}
"""Figures in the table, by file and beginning of the name, and what they are called there."""


def tokenizer_of(name: str, variant: str, seed: int) -> list[str]:
    """Arguments that choose the tokenizer."""
    if variant == "alias":
        return []
    target = variant if variant in TARGETS else "view"
    return [f"--model.seed={seed}", f"--model.targets={target}", *NETWORKS[name], *OF_VIEW.get(variant, [])]


def tokenizer_figures(variant: str, folder: Path, arguments: list[str], effort: float) -> dict[str, float]:
    """Train a tokenizer, then validate it."""
    stage = "alias" if variant == "alias" else "structure"
    train(stage, folder, effort, [*arguments, "--trainer.limit_val_batches=0"])
    metrics = [] if stage == "alias" else ["--trainer.callbacks=ReconstructionMetrics"]
    found = validate(QUICKSTART / f"{stage}.yaml", folder, [*arguments, *metrics], folder / stage / "last.ckpt")
    return {name: value for name, value in found.items() if value == value}


def student_figures(folder: Path, images: list[str], seed: int, effort: float) -> dict[str, float]:
    """Train a student alone on a tokenizer's tokens, then judge what it generates."""
    alone = f"--config={configs() / 'ablation' / 'no_teacher.yaml'}"
    tokenizer = f"--model.structure_tokenizer={folder / 'structure' / 'last.ckpt'}"
    arguments = [alone, *images, tokenizer, f"--model.seed={seed}"]
    data = train("fvar", folder, effort, [*arguments, "--trainer.limit_val_batches=0"]).datamodule
    reference = folder.parents[1] / "real.npz"
    if not reference.is_file():
        real_statistics(data).save(reference)
    metrics = ["--trainer.callbacks=GenerationMetrics", f"--trainer.callbacks.reference={reference}"]
    metrics.append(f"--trainer.callbacks.num_samples={GENERATED}")
    return validate(QUICKSTART / "fvar.yaml", folder, [*arguments, *metrics], folder / "fvar" / "last.ckpt")


def real_statistics(data: ImageDataModule) -> Statistics:
    """Of the first validation images, which generated ones are compared with."""
    extractor, images = EfficientNetLite0(), data.real_images("val")
    statistics = FeatureStatistics(extractor.name, extractor.num_features, data.schedule.image_size)
    for pixels, _ in DataLoader(Subset(images, range(min(REAL, len(images)))), batch_size=50):
        statistics.update(*extractor(pixels))
    return statistics.compute()


def validate(config: Path, folder: Path, arguments: list[str], checkpoint: Path) -> dict[str, float]:
    """`fvar validate` on 512 images at most: its figures."""
    common = ["--trainer.logger=false", f"--trainer.default_root_dir={folder}", "--trainer.limit_val_batches=32"]
    cli = run(["validate", f"--config={config}", *arguments, *common, f"--ckpt_path={checkpoint}"])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def study(name: str, variant: str, seed: int, source: str, folder: Path, effort: float) -> None:
    """One run, or what of it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images_of(name, source, seed)
    seeded = [f"--seed_everything={seed}", *images]
    path = folder / "tokenizer.json"
    if not path.is_file():
        arguments = [*seeded, *tokenizer_of(name, variant, seed)]
        write_json(path, tokenizer_figures(variant, folder, arguments, effort))
    path = folder / "student.json"
    if variant in TARGETS and not path.is_file():
        write_json(path, student_figures(folder, seeded, seed, effort))


def table(folder: Path, variants: Sequence[str]) -> str:
    """Markdown: mean and standard deviation over the seeds of every figure."""
    rows = {variant: figures(folder / variant) for variant in variants}
    columns = list(dict.fromkeys(name for found in rows.values() for name in found))
    cells = [[column, *(spread(found.get(column, [])) for found in rows.values())] for column in columns]
    return markdown(["figure", *rows], cells)


def figures(folder: Path) -> dict[str, list[float]]:
    """What the table shows of a variant, one value for every seed."""
    found: dict[str, list[float]] = {}
    for name, title in SHOWN.items():
        stage, _, figure = name.partition(" ")
        contents = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{stage}.json"))]
        for key in contents[0] if contents else ():
            if key.startswith(f"val/{figure}"):
                found[title + key.removeprefix(f"val/{figure}")] = [values[key] for values in contents]
    return found


def main(args: Sequence[str] | None = None) -> str:
    """Runs what is missing, and returns the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--images", required=True, help="folder of the images, or root of the torchvision data set")
    parser.add_argument("--output", default="targets", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the quickstart's numbers of steps")
    options = parser.parse_args(args)
    folder = options.output / options.set
    for seed in options.seeds:
        for variant in options.variants:
            study(options.set, variant, seed, options.images, folder / variant / str(seed), options.effort)
    return "\n\n".join(table(folder, group) for group in (TARGETS, ("view", *OF_VIEW), ("alias",)))


if __name__ == "__main__":
    print(main())
