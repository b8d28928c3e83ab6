"""Pictures for the loggers: samples and their way into focus, reconstructions of every focus state, code usage."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from fvar_lightning.callbacks.base import StudentEvaluation
from fvar_lightning.callbacks.loggers import log_pictures
from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.metrics.pictures import bar_chart, tile
from fvar_lightning.optics.refocus import Views
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.stage1 import Stage1Task
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tasks.training import prefix


class SamplePictures(StudentEvaluation):
    """Logs ``samples``, a row for each of some classes, and ``focus``, the first of each row after every scale.

    Args:
        classes: rows, spread evenly over all classes.
        per_class: images in a row.
        side: pixels of an image in the picture.
        batch_size, base_seed, sampling, weights, every_n_epochs: see `StudentEvaluation`.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(self, classes: int = 6, per_class: int = 4, side: int = 96, **options: Any) -> None:
        for name, value in (("classes", classes), ("per_class", per_class), ("side", side)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__(classes * per_class, **options)
        self.classes, self.per_class, self.side = classes, per_class, side

    def generate(self, trainer: Trainer, task: FVARTask) -> None:
        """By all ranks, as sharded weights need; logged by the first."""
        count = task.student.num_classes
        rows = min(self.classes, count)
        chosen = torch.tensor([row * count // rows for row in range(rows)], device=task.device)
        names = [task.class_names[label] for label in chosen]
        seeds = list(range(self.base_seed, self.base_seed + rows * self.per_class))
        labels, firsts, size = chosen.repeat_interleave(self.per_class), seeds[:: self.per_class], self.at_once(task)
        images: list[Tensor] = []
        for i in range(0, len(labels), size):
            images += task.generate(labels[i : i + size], seeds=seeds[i : i + size], **self.sampling).cpu()
        ways: list[list[Tensor]] = []
        for i in range(0, rows, size):
            stages = task.generate_stages(chosen[i : i + size], seeds=firsts[i : i + size], **self.sampling)
            ways += (list(way) for way in zip(*(stage.cpu() for stage in stages), strict=True))
        heads = [f"{n}x{n}" for n in task.vae.schedule.patch_nums]
        log_pictures(
            trainer,
            {
                "samples": tile(torch.stack(images).unflatten(0, (rows, -1)), names, side=self.side),
                "focus": tile(ways, names, heads, self.side),
            },
        )


class TokenizerPictures(Callback):
    """Logs ``reconstructions`` of a structure tokenizer at every focus state, and ``usage`` of the codebook by scale.

    Args:
        num_images: shown, the first of the loop.
        side: pixels of an image in the picture.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(self, num_images: int = 4, side: int = 96) -> None:
        for name, value in (("num_images", num_images), ("side", side)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_images, self.side = num_images, side

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another task."""
        if not isinstance(pl_module, Stage1Task):
            raise ValueError(
                f"TokenizerPictures needs a TokenizerTask or an AliasTokenizerTask, got {type(pl_module).__name__}"
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx == 0 and not trainer.sanity_checking and isinstance(pl_module, TokenizerTask):
            picture = reconstructions_picture(pl_module, first_images(batch, self.num_images), self.side)
            log_pictures(trainer, {"reconstructions": picture})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the usage that was logged."""
        part, logged = f"{prefix(trainer)}/usage/", trainer.callback_metrics
        usage = {name.removeprefix(part): float(logged[name]) for name in logged if name.startswith(part)}
        if usage and not trainer.sanity_checking:
            log_pictures(trainer, {"usage": bar_chart(usage, "Code usage: perplexity / min(codes, tokens seen)")})

    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end


def first_images(batch: ImageBatch, count: int) -> ImageBatch:
    """The first images of a batch, with all that belongs to them."""
    views = Views(*([view[:count] for view in part] for part in batch.views))
    return ImageBatch(batch.images[:count], batch.labels[:count], views, [state[:count] for state in batch.blurred])


def reconstructions_picture(task: TokenizerTask, batch: ImageBatch, side: int) -> Image.Image:
    """Two rows for each image: its focus states, and what the tokens up to the last scale of each state decode to."""
    decoded = task.reconstruct(batch)
    rows, names = [], []
    for i in range(len(batch.images)):
        rows += [[state[i] for state in batch.blurred], [image[i] for image in decoded]]
        names += ["image", "decoded"]
    heads = [f"radius {radius:.3g}" for radius in task.schedule.state_radii]
    return tile(rows, names, heads, side)
