"""`fvar quickstart`: all stages one after the other, small, and a report with pictures."""

import json
import shutil
from pathlib import Path
from time import perf_counter

import torch
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat
from torch import Tensor

from fvar_lightning.atomic import write_json
from fvar_lightning.callbacks.loggers import read_metrics
from fvar_lightning.cli import FVARCommandLine, configs, main
from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.generation.sampling import generate_stages
from fvar_lightning.metrics.pictures import line_chart, pyramid, tile
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.weights.files import read_checkpoint

STAGES = ("structure", "alias", "fvar")
CROPS_PER_IMAGE = 2
MAX_CLASSES = 8
SAMPLES = 6


def quickstart(source: str = "photographs", output: str = "quickstart", effort: PositiveFloat = 1.0) -> None:
    """Train both tokenizers and the teacher-student stage, then write pictures and a report.

    Called again with the same output folder it continues where it was stopped.

    Args:
        source: 'photographs' (bundled with scikit-image), or a folder of images or of class folders.
        output: folder for checkpoints, logs, pictures and the report.
        effort: factor on the number of training steps.
    """
    if not effort > 0:
        raise ValueError(f"effort must be positive, got {effort}")
    folder = Path(output)
    images = [f"--data.source={source}"]
    tokenizers = [f"--model.{kind}_tokenizer={folder / kind / 'last.ckpt'}" for kind in ("structure", "alias")]

    print("\n[1/4] training the structure tokenizer", flush=True)
    data = train("structure", folder, effort, images).datamodule
    print("\n[2/4] training the alias tokenizer", flush=True)
    train("alias", folder, effort, images)
    print("\n[3/4] writing the tokens of the images", flush=True)
    for part in ("train", "val"):
        write_tokens(folder, part, [*images, *tokenizers])
    print("\n[4/4] training teacher and student", flush=True)
    restart_if_older(folder / "fvar", folder / "tokens" / "train" / "index.json")
    caches = [f"--data.path={folder / 'tokens' / 'train'}", f"--data.val_path={folder / 'tokens' / 'val'}"]
    task = train("fvar", folder, effort, [*caches, *tokenizers]).model

    print("\nwriting the report", flush=True)
    write_report(folder, task, data)
    print(f"done, see {folder / 'report.md'} and")
    for picture in sorted(folder.glob("*.png")):
        print(f"  {picture}")


def quickstart_command(args: list[str]) -> None:
    """`fvar quickstart` with the given arguments."""
    auto_cli(quickstart, args=args, prog="fvar quickstart")


def train(stage: str, folder: Path, effort: float, arguments: list[str]) -> FVARCommandLine:
    """One `fvar fit` of a stage, resumed from its last checkpoint where there is one."""
    config = configs() / "quickstart" / f"{stage}.yaml"
    content = yaml.safe_load(config.read_text())
    steps = max(round(effort * content["trainer"]["max_steps"]), 2)
    own = folder / stage
    args = [
        "fit",
        f"--config={config}",
        f"--trainer.max_steps={steps}",
        f"--trainer.default_root_dir={own}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={own}",
        "--trainer.logger.name=logs",
        f"--trainer.callbacks.dirpath={own}",
    ]
    # so that the shortest run has figures
    for name, most in (("val_check_interval", steps), ("log_every_n_steps", max(steps // 10, 1))):
        if name in content["trainer"]:
            args.append(f"--trainer.{name}={min(content['trainer'][name], most)}")
    last = own / "last.ckpt"
    done = 0
    if last.is_file():
        done = read_checkpoint(last)["global_step"]
        args.append(f"--ckpt_path={last}")
    elif stage != "fvar":
        warmup = content["model"]["init_args"]["warmup_steps"]
        args.append(f"--model.warmup_steps={min(warmup, steps // 2)}")
    args += arguments
    start = perf_counter()
    cli = main(args)
    if cli.trainer.global_step > done:
        _add_seconds(folder / "seconds.json", stage, perf_counter() - start)
    return cli


def write_tokens(folder: Path, part: str, arguments: list[str]) -> None:
    """The token cache of a part by `fvar predict`; what is there of the same tokenizers and images is kept."""
    start = perf_counter()
    args = [
        "predict",
        f"--config={configs() / 'quickstart' / 'tokens.yaml'}",
        *arguments,
        "--data.predict=tokens",
        f"--data.part={part}",
        f"--data.crops_per_image={CROPS_PER_IMAGE}",
        f"--trainer.callbacks.folder={folder / 'tokens' / part}",
        f"--trainer.default_root_dir={folder}",
    ]
    main(args)
    _add_seconds(folder / "seconds.json", "tokens", perf_counter() - start)


def restart_if_older(stage: Path, index: Path) -> None:
    """Remove a stage that was trained on the tokens of other tokenizers, before these were written."""
    last = stage / "last.ckpt"
    if last.is_file() and last.stat().st_mtime < index.stat().st_mtime:
        print("the tokens are new: teacher and student begin anew", flush=True)
        shutil.rmtree(stage)


def _add_seconds(path: Path, stage: str, seconds: float) -> None:
    spent = json.loads(path.read_text()) if path.is_file() else {}
    spent[stage] = spent.get(stage, 0) + seconds
    write_json(path, spent)


@torch.no_grad()
def write_report(folder: Path, task: FVARTask, data: ImageDataModule) -> None:
    """Pictures and figures of a finished run.

    Args:
        folder: of the run; the report is written into it.
        task: of the last stage.
        data: that it was trained on.
    """
    task.eval()
    batch = one_of_each_class(data)
    vae, schedule = task.vae, task.vae.schedule
    pyramid(batch.views, schedule.radii).save(folder / "pyramid.png")

    tokens = task.tokens(batch)
    stages = vae.decode_stages(tokens.structure)
    names = [data.class_names[label] for label in batch.labels]
    rows = [list(batch.images), list(stages[-1])]
    tile(rows, ["photograph", "reconstruction"], names, side=112).save(folder / "reconstructions.png")

    labels = batch.labels.repeat_interleave(SAMPLES)
    made = generate_stages(task.student, vae, labels, seeds=range(len(labels)), **task.sampling)
    rows = [
        [*made[-1][i * SAMPLES : (i + 1) * SAMPLES], *(stage[i * SAMPLES] for stage in made)]
        for i in range(len(batch.labels))
    ]
    heads = [f"sample {i + 1}" for i in range(SAMPLES)] + [f"1: {n}x{n}" for n in schedule.patch_nums]
    tile(rows, names, heads, side=80).save(folder / "samples.png")

    curves = {stage: read_metrics(folder / stage) for stage in STAGES}
    losses = {stage: loss_curves(found) for stage, found in curves.items()}
    line_chart(losses, "step").save(folder / "losses.png")
    (folder / "report.md").write_text(report_text(folder, curves))


def loss_curves(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The terms of the loss in training, and those of them that validation has too."""
    terms = {name.removeprefix("train/") for name in found if name.startswith("train/")}
    return {name: points for name, points in found.items() if name.split("/", 1)[1] in terms}


def one_of_each_class(data: ImageDataModule) -> ImageBatch:
    """The first validation image of up to `MAX_CLASSES` classes, with its views."""
    images: dict[int, Tensor] = {}
    for pixels, labels in data.val_dataloader():
        for image, label in zip(pixels, labels.tolist(), strict=True):
            images.setdefault(label, image)
        if len(images) == data.num_classes:
            break
    chosen = sorted(images)[:MAX_CLASSES]
    return data.on_after_batch_transfer([torch.stack([images[c] for c in chosen]), torch.tensor(chosen)], 0)


def report_text(folder: Path, curves: dict[str, dict[str, list[tuple[int, float]]]]) -> str:
    """The report in Markdown: first and last value of every figure."""
    seconds = json.loads((folder / "seconds.json").read_text())
    lines = ["# Quickstart report", ""]
    for picture in ("pyramid", "reconstructions", "samples", "losses"):
        lines += [f"![{picture}]({picture}.png)", ""]
    lines += ["A tokenizer's first steps are un-quantised; its losses jump where its codes come in.", ""]
    for stage, found in curves.items():
        lines += [
            f"## {stage} ({seconds.get(stage, 0):.0f} s)",
            "",
            "| figure | first | last | at step |",
            "|---|---|---|---|",
        ]
        for name, points in sorted(found.items()):
            lines.append(f"| {name} | {points[0][1]:.4g} | {points[-1][1]:.4g} | {points[-1][0]} |")
        lines.append("")
    return "\n".join(lines)
