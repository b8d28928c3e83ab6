"""Stage1Task: what the training of both tokenizers shares (stage 1)."""

from collections.abc import Sized
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from fvar_lightning.checks import check_not_negative
from fvar_lightning.data.batches import ImageBatch, in_precision
from fvar_lightning.metrics.tokenizer import CodebookUsage
from fvar_lightning.tasks.finite import FiniteTask
from fvar_lightning.tasks.training import (
    WarmupLinear,
    batch_generator,
    check_lr_plan,
    check_seed,
    check_views,
    parameter_groups,
    prefix,
    training_steps,
    use_right_weights,
)
from fvar_lightning.tokenizer.build import Tokenizer
from fvar_lightning.tokenizer.losses import pixel_loss
from fvar_lightning.tokenizer.reconstruction import Reconstruction
from fvar_lightning.weights.describe import describe, differences


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW as tokenizers are usually trained."""
    return torch.optim.AdamW(params, lr=3e-4, betas=(0.5, 0.9), weight_decay=0.05)


class Stage1Task(FiniteTask):
    """Trains one tokenizer on the batches of `ImageDataModule`. Subclasses say what a pass is, and judge it.

    Args:
        tokenizer: to be trained.
        scales: of how many scales, the first ones, it makes tokens.
        l1_weight, l2_weight: of the pixel losses.
        vq_weight: of the codebook and commitment loss.
        optimizer: of all parameters.
        lr_warmup: part of the run during which the learning rate rises.
        lr_final: learning rate at the end over its peak.
        seed: of what is random in a step.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scales: int,
        *,
        l1_weight: float,
        l2_weight: float,
        vq_weight: float,
        optimizer: OptimizerCallable,
        lr_warmup: float,
        lr_final: float,
        seed: int,
    ) -> None:
        super().__init__()
        check_lr_plan(lr_warmup, lr_final)
        check_seed(seed)
        check_not_negative({"l1_weight": l1_weight, "l2_weight": l2_weight, "vq_weight": vq_weight})
        self.schedule = tokenizer.schedule
        # on a CPU 1.06 to 1.13 times as fast as contiguous maps in float32 (docs/speed.md); on a GPU, where its makers
        # recommend it for convolutions but a GroupNorm returns contiguous maps, not measured
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)
        self.scales = scales
        self.pixel_weights, self.vq_weight = (l1_weight, l2_weight), vq_weight
        self.optimizer_factory = optimizer
        self.lr_plan = lr_warmup, lr_final
        self.seed = seed
        self.usage = CodebookUsage(scales, tokenizer.vocab_size)

    # What subclasses do

    def run(self, batch: ImageBatch, generator: torch.Generator | None) -> Reconstruction:
        """Encode, quantise and decode; with a generator as in training."""
        raise NotImplementedError

    def further_losses(self, passed: Reconstruction, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The loss of a training step with what comes on top of pixels and codes, each also put among the `terms`."""
        return loss

    def judge(self, passed: Reconstruction) -> None:
        """Accumulate figures of a validation batch."""
        raise NotImplementedError

    def log_figures(self) -> None:
        """Log these figures at the end of a validation, before all metrics of the task begin anew."""
        raise NotImplementedError

    # When they do it

    def setup(self, stage: str) -> None:
        """Refuse a data module of other views, and half-precision weights, in which a codebook's averages stand still.

        Raises:
            ValueError: naming what differs, or the trainer's precision.
        """
        check_views(self, self.schedule, self.tokenizer.psf)
        if str(self.trainer.precision).endswith("16-true"):
            raise ValueError(
                f"precision must be 32-true, bf16-mixed or 16-mixed for a tokenizer, got {self.trainer.precision}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how to build the tokenizer, so that stage 2 and `load_tokenizer` can."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer"] = describe(self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from a tokenizer of other views; warn where one is judged by them, as for another image size.
        Of averaged and last weights, load what the run is to use.

        Raises:
            ValueError: naming what differs.
        """
        own = {name: x for name, x in describe(self.tokenizer).items() if name in ("schedule", "psf")}
        if differing := differences(checkpoint.get("tokenizer", own), own):
            if self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING:
                raise ValueError(f"the checkpoint is of a tokenizer of other views: {differing}")
            rank_zero_warn(f"the tokenizer is judged by other views than those it was trained on: {differing}")
        use_right_weights(self._trainer, checkpoint)

    def on_train_start(self) -> None:
        """Refuse batches that are too small to initialise the codebook; warn of a run that ends before."""
        codebook, loader = self.tokenizer.codebook, self.trainer.train_dataloader
        if isinstance(loader, DataLoader) and codebook.warming_up:
            images = min(
                (loader.batch_size or 1) * self.trainer.accumulate_grad_batches, len(cast(Sized, loader.sampler))
            )
            sides = self.schedule.patch_nums[: self.scales]
            codebook.check_pool([images * self.trainer.world_size * side**2 for side in sides])
        if codebook.warmup_steps >= self.trainer.estimated_stepping_batches:
            rank_zero_warn(
                f"warmup_steps {codebook.warmup_steps} leaves no step of the run's "
                f"{self.trainer.estimated_stepping_batches} to set the codes in: stage 2 cannot use this tokenizer"
            )

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One step; logs every term as ``train/*``."""
        key = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        terms = self.losses(batch, batch_generator(self.device, *key))
        self.report(terms, batch_idx)
        return terms["loss"]

    def losses(self, batch: ImageBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """All terms of a training step, and their weighted sum as ``loss``."""
        passed = self.run(in_precision(batch, next(self.tokenizer.parameters()).dtype), generator)
        loss, pixel = self._loss(passed)
        terms = {"pixel": pixel, "vq": passed.loss}
        return {"loss": self.further_losses(passed, loss, terms), **terms}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The codebook's step: once for each of the optimiser's, before any checkpoint of it."""
        self.tokenizer.codebook.step()

    def _loss(self, passed: Reconstruction) -> tuple[Tensor, Tensor]:
        pairs = zip(passed.decoded, passed.targets, strict=True)
        pixel = torch.stack([pixel_loss(x, y, *self.pixel_weights) for x, y in pairs]).mean()
        return pixel + self.vq_weight * passed.loss, pixel

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        """Accumulate ``val/loss`` (``test/loss`` in a test, and so on), the task's figures and code usage; hands
        callbacks what was ``decoded``."""
        passed = self.run(in_precision(batch, next(self.tokenizer.parameters()).dtype), None)
        loss, _ = self._loss(passed)
        self.log(f"{prefix(self.trainer)}/loss", loss, sync_dist=True, batch_size=len(batch.images))
        self.usage.update(passed.indices)
        self.judge(passed)
        return {"decoded": passed.decoded}

    def on_validation_epoch_end(self) -> None:
        """Log ``val/usage/*`` and the task's figures."""
        usage = self.usage.compute()
        sides = self.schedule.patch_nums[: self.scales]
        name = f"{prefix(self.trainer)}/usage"
        self.log_dict({f"{name}/{n}x{n}": u for n, u in zip(sides, usage[:-1], strict=True)})
        self.log(f"{name}/all", usage[-1], prog_bar=True)
        self.log_figures()
        with torch.inference_mode(False):  # Lightning validates in it, and a later fit could not add to what it leaves
            for metric in self.children():
                if isinstance(metric, Metric):
                    metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def parameters_to_train(self) -> list[dict[str, Any]]:
        """Groups for the optimiser."""
        return parameter_groups([self.tokenizer])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with a learning rate that warms up and then falls linearly."""
        optimizer = self.optimizer_factory(self.parameters_to_train())
        scheduler = WarmupLinear(optimizer, training_steps(self.trainer), *self.lr_plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
