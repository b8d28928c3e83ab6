"""log_picture(): a picture into whatever logger a run has; read_metrics(): figures out of what a CSV logger wrote."""

import csv
from pathlib import Path

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image

from fvar_lightning.atomic import replacing
from fvar_lightning.tasks.training import prefix


def log_picture(logger: Logger, name: str, image: Image.Image, step: int) -> None:
    """TensorBoard: an image; CSV: ``pictures/<name>-<step>.png`` beside metrics.csv; W&B: an image. Call on rank 0.

    Args:
        logger: another kind gets a warning and no picture.
        name: with ``/`` between its parts.
        image: RGB.
        step: of training.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
    elif isinstance(logger, CSVLogger):
        path = Path(logger.log_dir, "pictures", f"{name.replace('/', '_')}-{step:07d}.png")
        with replacing(path) as beside:
            image.save(beside, format="PNG")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [image], step=step)
    elif not isinstance(logger, DummyLogger):
        rank_zero_warn(
            f"{type(logger).__name__} gets no pictures: only TensorBoardLogger, CSVLogger and WandbLogger do"
        )


def log_pictures(trainer: Trainer, pictures: dict[str, Image.Image]) -> None:
    """Into all loggers of a run, at its step, under ``val/`` or ``test/``; ranks other than 0 do nothing."""
    part = prefix(trainer)
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            for name, image in pictures.items():
                log_picture(logger, f"{part}/{name}", image, trainer.global_step)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All figures that CSV loggers wrote below a folder: name -> (step, value), a resumed run's parts joined."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and "/" in name:
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}
