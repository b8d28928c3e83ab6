"""StudentEvaluation: when callbacks generate images in validation and test, with which weights, and shared how."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fvar_lightning.checks import check_choice
from fvar_lightning.schedule import VAR_PATCH_NUMS
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.training import prefix
from fvar_lightning.weights.averages import Weights, has_averages, state_of
from fvar_lightning.weights.identity import file_sha256, weights_sha256
from fvar_lightning.weights.pretrained import check_sampling

T = TypeVar("T")

IMAGES_AT_ONCE = 32
"""Images of 256 px generated together, unless told otherwise."""


def use_raw_weights(task: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Put the weights of the last step in the place of those `EMAWeightAveraging` averaged, if the checkpoint has both.

    For `on_load_checkpoint`, which comes after the averaged ones were loaded.
    """
    if not has_averages(checkpoint):
        return
    task.load_state_dict(state_of(checkpoint, "raw"))


def identify_weights(trainer: Trainer, task: LightningModule) -> dict[str, str | None]:
    """``path`` and ``sha256`` of the run's checkpoint; without one, path None and the hash of the weights in memory.

    All ranks must call it, once the checkpoint is loaded.
    """
    path = trainer.ckpt_path
    if path is None:
        return {"path": None, "sha256": weights_sha256(task.state_dict())}
    sha256 = file_sha256(path) if trainer.is_global_zero else ""
    return {"path": str(path), "sha256": trainer.strategy.broadcast(sha256)}


class StudentEvaluation(Callback):
    """Base of what is done with images that the student generates.

    With weights `ema` they are generated at the last batch of the loop: `EMAWeightAveraging` has put the average in
    place before the first and takes it away after the last, so the order of the callbacks does not matter. With `raw`
    they are generated before the loop, of the weights training goes on with; outside of `fit`, the raw weights of the
    checkpoint are loaded for the whole run. Where training keeps no average, both are the same.

    Image i of N has label floor(i C / N) of C classes (equally many of each if C divides N) and seed `base_seed` + i:
    it is the same however many ranks share the work, and the same as that of `fvar predict`. Global random states are
    left as they were, also by the data loaders.

    Args:
        num_samples: N, images to generate.
        batch_size: images generated at once on a device; None: 32, or fewer that hold no more tokens than 32 images of
            256 px.
        base_seed: seed of the first image.
        sampling: guidance, top_k, top_p, more_smooth in the place of the task's.
        weights: `ema`: averaged weights where training keeps them; `raw`: those of the last step.
        every_n_epochs: in validations during the epochs n, 2n, ... of `fit`; `validate` and `test` always do it.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int | None = None,
        base_seed: int = 0,
        sampling: dict[str, Any] | None = None,
        weights: Weights = "ema",
        every_n_epochs: int = 1,
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("batch_size", 1 if batch_size is None else batch_size, 1),
            ("base_seed", base_seed, 0),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_choice("weights", weights, Weights)
        self.num_samples, self.batch_size, self.base_seed = num_samples, batch_size, base_seed
        self.sampling = check_sampling(sampling)
        self.weights = weights
        self.every_n_epochs = every_n_epochs
        self.active = self.finished = False

    # What subclasses do

    def prepare(self, trainer: Trainer, task: FVARTask, stage: str) -> None:
        """At the beginning of the run: checks that would be late after hours of training."""

    def begin(self, trainer: Trainer, task: FVARTask) -> None:
        """Before the first batch."""

    def observe(self, trainer: Trainer, task: FVARTask, batch: Any, batch_idx: int) -> None:
        """Every batch of the loop."""

    def generate(self, trainer: Trainer, task: FVARTask) -> None:
        """With the weights to be judged in place."""
        raise NotImplementedError

    def figures(self, trainer: Trainer, task: FVARTask) -> dict[str, float]:
        """After the last batch: what is logged, under ``val/`` or ``test/``; the same on all ranks."""
        return {}

    # When they do it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another task; this one takes the image size and the classes of the data module first."""
        if stage == "predict":
            return
        if not isinstance(pl_module, FVARTask):
            raise ValueError(f"{type(self).__name__} needs a FVARTask, got {type(pl_module).__name__}")
        pl_module.follow_data()
        self.finished = False
        self.prepare(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Outside of `fit`: raw weights, if these are asked for."""
        if self.weights == "raw" and not _fitting(trainer):
            use_raw_weights(pl_module, checkpoint)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, if it is this epoch's turn; with the weights of the running step, generate."""
        assert isinstance(pl_module, FVARTask)
        self.active = not trainer.sanity_checking
        if self.active and _fitting(trainer):
            self.active = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if self.active:
            self.begin(trainer, pl_module)
            if self._before_the_loop(trainer):
                self._generate(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Observe the batch; behind the last one, generate and log the figures."""
        if not self.active:
            return
        assert isinstance(pl_module, FVARTask)
        self.observe(trainer, pl_module, batch, batch_idx)
        if not is_last_batch(trainer, batch_idx, dataloader_idx):
            return
        if not self._before_the_loop(trainer):
            self._generate(trainer, pl_module)
        with isolate_rng(include_cuda=False):
            values = self.figures(trainer, pl_module)
        part = prefix(trainer)
        pl_module.log_dict({f"{part}/{name}": value for name, value in values.items()}, sync_dist=True, batch_size=1)
        self.finished = True

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def _before_the_loop(self, trainer: Trainer) -> bool:
        return self.weights == "raw" and _fitting(trainer)

    def _generate(self, trainer: Trainer, task: FVARTask) -> None:
        with isolate_rng(include_cuda=False), trainer.precision_plugin.forward_context():
            self.generate(trainer, task)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to end `validate` or `test` without figures."""
        if stage in ("validate", "test") and not self.finished:
            raise ValueError(
                f"{type(self).__name__} had no batch to run at: the data module has no {stage} data "
                "(val_fraction of ImageDataModule, val_path of TokenDataModule)"
            )

    # The images

    def at_once(self, task: FVARTask) -> int:
        """How many are generated together."""
        fitting = IMAGES_AT_ONCE * sum(n**2 for n in VAR_PATCH_NUMS) // task.student.layout.length
        return self.batch_size or max(min(IMAGES_AT_ONCE, fitting), 1)

    def label(self, index: int, num_classes: int) -> int:
        """Class of an image."""
        return index * num_classes // self.num_samples

    def samples(self, trainer: Trainer, task: FVARTask) -> Iterator[Tensor]:
        """This rank's share, (B, 3, H, W) in [-1, 1].

        All ranks yield equally often, as sharded weights need; B may be 0.
        """
        ranks, rank = trainer.world_size, trainer.global_rank
        mine = range(rank, self.num_samples, ranks)
        shares = -(-self.num_samples // ranks)
        size = self.at_once(task)
        for start in progress(trainer, range(0, shares, size), "Generating"):
            part = list(mine[start : start + size])
            made = part or [0]
            labels = torch.tensor([self.label(i, task.student.num_classes) for i in made], device=task.device)
            images = task.generate(labels, seeds=[self.base_seed + i for i in made], **self.sampling)
            yield images[: len(part)].float()


def is_last_batch(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Whether a loop of validation or test ends with this batch."""
    batches = num_batches(trainer)
    return dataloader_idx + 1 == len(batches) and batch_idx + 1 == batches[dataloader_idx]


def num_batches(trainer: Trainer) -> list[int | float]:
    """Batches of every loader of the running validation or test, on a rank."""
    if trainer.testing:
        return trainer.num_test_batches
    return trainer.num_val_batches


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def progress(trainer: Trainer, steps: Iterable[T], description: str) -> Iterable[T]:
    """The steps, with a bar of their own where the trainer has one."""
    bar = trainer.progress_bar_callback is not None and trainer.is_global_zero
    return tqdm(steps, description, leave=False, disable=not bar)
