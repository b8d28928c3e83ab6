"""SampleWriter: the pictures that `fvar predict` makes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fvar_lightning.callbacks.base import identify_weights, progress, use_raw_weights
from fvar_lightning.callbacks.samples import Sample, SampleFolder
from fvar_lightning.checks import check_choice
from fvar_lightning.data.loaders import SharedLoaders
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.weights.averages import Weights
from fvar_lightning.weights.identity import versions
from fvar_lightning.weights.pretrained import check_sampling

Output = Literal["png", "npz", "both"]


class SampleWriter(BasePredictionWriter):
    """Writes generated images into a folder, each at once and whole; see `SampleFolder` for what is in it.

    Started again after an interruption, a run generates the batches of which images are missing, and ends with the
    same files as an undisturbed one (to the last bit with the same batch size on as many of the same devices). With
    other settings or another checkpoint the folder is refused. Predictions are not collected in memory.

    Args:
        folder: where to; seen by all ranks.
        output: `png`: pictures; `npz`: one file for the ADM suite, made of pictures that are removed when it is
            complete; `both`. Asked for later in the same folder, either is made of the other, without generating.
        sampling: guidance, top_k, top_p, more_smooth in the place of the task's.
        weights: `ema`: averaged weights where training kept them; `raw`: those of the last step.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        folder: str,
        output: Output = "png",
        sampling: dict[str, Any] | None = None,
        weights: Weights = "ema",
    ) -> None:
        super().__init__("batch")
        check_choice("output", output, Output)
        check_choice("weights", weights, Weights)
        self.root = Path(folder)
        self.output = output
        self.sampling = check_sampling(sampling)
        self.weights = weights
        self.own_sampling: dict[str, Any] = {}
        self.folder: SampleFolder | None = None
        self.samples: list[Sample] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module ask which images are there; it then raises a ValueError if the folder holds others.

        Raises:
            ValueError: if the data module asks for no images.
        """
        if stage != "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, FVARTask) or not isinstance(data, SharedLoaders):
            raise ValueError("SampleWriter needs a FVARTask, and an ImageDataModule or a TokenDataModule")
        if (asked := getattr(data, "predict", "samples")) != "samples":
            raise ValueError(f"predict of the data module must be 'samples' for a SampleWriter, got {asked!r}")
        trainer.predict_loop.return_predictions = False
        self.own_sampling = pl_module.sampling
        pl_module.sampling = pl_module.sampling | self.sampling
        # not yet: the checkpoint, which the folder must fit, is loaded later
        data.finished_seeds = lambda: self._finished_seeds(trainer, pl_module, data)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the task its own sampling back."""
        if stage == "predict":
            assert isinstance(pl_module, FVARTask)
            pl_module.sampling = self.own_sampling

    def _finished_seeds(self, trainer: Trainer, task: FVARTask, data: SharedLoaders) -> list[int]:
        """Of the images that are there, the same on all ranks."""
        names, count = task.class_names, data.samples_per_class
        self.folder = SampleFolder(self.root, names)
        self.samples = [Sample(i // count, data.base_seed + i) for i in range(len(names) * count)]
        checkpoint = identify_weights(trainer, task)
        finished: list[Sample] | str = []
        if trainer.is_global_zero:
            try:
                self._claim(checkpoint, str(trainer.precision), task, data)
                finished = self.folder.finished(self.samples)
            except ValueError as error:
                finished = str(error)
        # one rank looks, so that all share the same work; a refusal ends all of them
        finished = trainer.strategy.broadcast(finished)
        if isinstance(finished, str):
            raise ValueError(finished)
        if finished:
            rank_zero_info(f"{len(finished)} of {len(self.samples)} images are in {self.root} already")
        if len(finished) == len(self.samples):
            self._complete(trainer)
        return [sample.seed for sample in finished]

    def _claim(self, checkpoint: dict[str, str | None], precision: str, task: FVARTask, data: SharedLoaders) -> None:
        assert self.folder is not None
        settings = {
            "checkpoint_sha256": checkpoint["sha256"],
            "weights": self.weights,
            "sampling": task.sampling,
            "samples_per_class": data.samples_per_class,
            "base_seed": data.base_seed,
            "class_names": task.class_names,
            "image_size": task.vae.schedule.image_size,
            "precision": precision,
        }
        seeds = "image i of a class has seed base_seed + label * samples_per_class + i"
        self.folder.claim(settings, {"checkpoint": checkpoint["path"], "seeds": seeds, "versions": versions()})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raw weights, if these are asked for."""
        if self.weights == "raw" and trainer.predicting:
            use_raw_weights(pl_module, checkpoint)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self.folder is not None
        for image, label, seed in zip(prediction, batch.labels.tolist(), batch.seeds.tolist(), strict=True):
            self.folder.write(image, Sample(label, seed))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pack the images, if all are there and a file is asked for; unpack them where pictures are."""
        trainer.strategy.barrier()
        self._complete(trainer)

    def _complete(self, trainer: Trainer) -> None:
        assert self.folder is not None
        if not trainer.is_global_zero:
            return
        if self.folder.npz.is_file():
            if self.output != "npz":
                self.folder.unpack(self.samples, lambda steps: progress(trainer, steps, "Unpacking"))
        elif self.output != "png":
            missing = len(self.samples) - len(self.folder.finished(self.samples))
            if missing:
                rank_zero_info(f"{missing} of {len(self.samples)} images are missing: {self.folder.npz} is not written")
                return
            self.folder.pack(self.samples, lambda steps: progress(trainer, steps, "Packing"))
        if self.output == "npz":
            self.folder.remove_pictures(self.samples)
