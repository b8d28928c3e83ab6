"""TokenizerTask: stage 1, the training of the structure tokenizer or of the alias tokenizer."""

from collections.abc import Sequence, Sized
from dataclasses import asdict
from typing import Any, cast, get_args

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image import PeakSignalNoiseRatio

from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.metrics.tokenizer import CodebookUsage, SignalToNoise
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.training import (
    batch_generator,
    check_schedule,
    parameter_groups,
    training_steps,
    warmup_linear,
)
from fvar_lightning.tokenizer.alias import AliasPass, AliasTokenizer
from fvar_lightning.tokenizer.build import Kind, build_tokenizer
from fvar_lightning.tokenizer.losses import (
    TEXTURE_WINDOW,
    Discriminator,
    Perceptual,
    adaptive_weight,
    build_discriminator,
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    pixel_loss,
    texture_loss,
)
from fvar_lightning.tokenizer.vqvae import VQVAE, Targets
from fvar_lightning.weights.describe import describe


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW as tokenizers are usually trained."""
    return torch.optim.AdamW(params, lr=3e-4, betas=(0.5, 0.9), weight_decay=0.05)


class TokenizerTask(LightningModule):
    """Trains one tokenizer on the batches of `ImageDataModule`.

    Args:
        schedule: token layout and focus states; equal to the data module's.
        kind: ``structure`` (Q_L) or ``alias`` (Q_A).
        targets: what a token map of the structure tokenizer stands for, see `VQVAE`.
        vocab_size, z_channels, ch, num_res_blocks: of the network.
        ch_mult, norm_groups: of the `VQVAE` (structure).
        decay, warmup_steps, revive_after: of the `Codebook`.
        l1_weight, l2_weight: of the pixel losses.
        vq_weight: of the codebook and commitment loss.
        perceptual: network of the perceptual loss (structure), see `perceptual_loss`.
        perceptual_weight: of the perceptual loss.
        texture_weight: of the `texture_loss`; 0: none (structure).
        adversarial_weight: of the discriminator's opinion, on top of the adaptive weight; 0: none (structure).
        adversarial_start: part of the run before the discriminator joins.
        discriminator: ``patch``: `PatchDiscriminator`; ``efficientnet_lite1``: `FeatureDiscriminator`.
        discriminator_ch: its width.
        scale_dropout: probability that a sample is decoded after an earlier scale, against the focus state of that
            scale, so that a partial token sequence decodes to a blurred image (structure).
        noise: standard deviation of the noise on the input at the first and the last scale (beta of the paper), in
            training only and never on a target (structure).
        optimizer: of all parameters.
        lr_warmup: part of the run during which the learning rate rises.
        lr_final: learning rate at the end over its peak.
        seed: of noise and scale dropout.
    """

    def __init__(
        self,
        schedule: FocusSchedule = FocusSchedule(),  # noqa: B008 - frozen
        kind: Kind = "structure",
        targets: Targets = "view",
        vocab_size: int = 8192,
        z_channels: int = 32,
        ch: int = 160,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        norm_groups: int = 32,
        decay: float = 0.99,
        warmup_steps: int = 1000,
        revive_after: int = 200,
        l1_weight: float = 0.2,
        l2_weight: float = 1.0,
        vq_weight: float = 1.0,
        perceptual: Perceptual = "none",
        perceptual_weight: float = 1.0,
        texture_weight: float = 0.0,
        adversarial_weight: float = 0.0,
        adversarial_start: float = 0.2,
        discriminator: Discriminator = "patch",
        discriminator_ch: int = 64,
        scale_dropout: float = 0.1,
        noise: tuple[float, float] = (1e-3, 1e-2),
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup: float = 0.02,
        lr_final: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = FocusSchedule.of(schedule)
        for name, value, choices in (
            ("perceptual", perceptual, get_args(Perceptual)),
            ("discriminator", discriminator, get_args(Discriminator)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        if not 0 <= scale_dropout < 1:
            raise ValueError(f"scale_dropout must lie in [0, 1), got {scale_dropout}")
        if not 0 <= adversarial_start <= 1:
            raise ValueError(f"adversarial_start must lie in [0, 1], got {adversarial_start}")
        if kind == "alias" and (perceptual != "none" or texture_weight or adversarial_weight):
            raise ValueError(
                "perceptual, texture_weight and adversarial_weight must be 'none', 0 and 0 for kind 'alias', whose "
                f"targets are no images, got {perceptual!r}, {texture_weight} and {adversarial_weight}"
            )
        if texture_weight and self.schedule.image_size < TEXTURE_WINDOW:
            raise ValueError(
                f"texture_weight must be 0 for images below {TEXTURE_WINDOW} px, got {texture_weight} for images of "
                f"{self.schedule.image_size} px"
            )
        if len(noise) != 2 or min(noise) < 0:
            raise ValueError(f"noise must be two standard deviations from 0, got {noise}")
        # the command line offers every task the classes, and would keep them here
        self.save_hyperparameters(ignore=["optimizer", "num_classes", "class_names"])
        self.hparams["schedule"] = asdict(self.schedule)
        self.optimizer_factory = optimizer
        self.pixel_weights, self.vq_weight = (l1_weight, l2_weight), vq_weight
        self.perceptual_weight, self.texture_weight = perceptual_weight, texture_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.scale_dropout, self.noise, self.seed = scale_dropout, tuple(noise), seed
        self.lr_plan = lr_warmup, lr_final
        self.tokenizer = build_tokenizer(
            kind,
            self.schedule,
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            num_res_blocks=num_res_blocks,
            decay=decay,
            warmup_steps=warmup_steps,
            revive_after=revive_after,
            **({"targets": targets, "ch_mult": ch_mult, "norm_groups": norm_groups} if kind == "structure" else {}),
        )
        # convolutions run up to three times faster on this layout
        self.tokenizer.to(memory_format=torch.channels_last)
        self.perceptual = perceptual
        # in a list: a frozen network is neither trained nor saved
        self._perceptual: list[nn.Module] = []
        self.discriminator = build_discriminator(discriminator, discriminator_ch) if adversarial_weight > 0 else None
        # the last scale is sharp and has no residual
        self.scales = self.schedule.num_scales - (kind == "alias")
        self.usage = CodebookUsage(self.scales, vocab_size)
        self.psnr = PeakSignalNoiseRatio(data_range=2.0)
        self.snr = SignalToNoise(self.scales if kind == "alias" else 1)

    def setup(self, stage: str) -> None:
        """Refuse a data module of another schedule; for a fit, load the network of the perceptual loss."""
        check_schedule(self, self.schedule)
        if stage == "fit" and self.perceptual != "none":
            self._perceptual = [perceptual_loss(self.perceptual)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how to build the tokenizer, so that stage 2 and `load_tokenizer` can."""
        checkpoint["tokenizer"] = describe(self.tokenizer)

    def _inputs(self, batch: ImageBatch, generator: torch.Generator | None) -> Tensor | list[Tensor]:
        """What the structure tokenizer encodes; with noise where there is a generator."""
        assert isinstance(self.tokenizer, VQVAE)
        if self.tokenizer.targets == "feature":
            return _noisy([batch.images], self.noise[1:], generator)[0]
        views = batch.views.focused if self.tokenizer.targets == "view" else batch.blurred
        return _noisy(views, np.linspace(self.noise[0], self.noise[1], len(views)).tolist(), generator)

    def _pass(self, batch: ImageBatch, generator: torch.Generator | None) -> AliasPass:
        """Encode, quantise and decode."""
        if isinstance(self.tokenizer, AliasTokenizer):
            return self.tokenizer(batch.views.alias[: self.scales])
        quantized = self.tokenizer(self._inputs(batch, generator))
        f_hat, target = quantized.stages[-1], batch.images
        if generator is not None and self.scale_dropout > 0:
            scale = self._last_scales(len(target), generator)
            rows = torch.arange(len(target), device=self.device)
            states = torch.tensor(self.schedule.states, device=self.device)
            f_hat = torch.stack(quantized.stages)[scale, rows]
            target = torch.stack(batch.blurred)[states[scale], rows]
        image = self.tokenizer.decode_features(f_hat)
        return AliasPass([image], [target], quantized.indices, quantized.loss)

    def _last_scales(self, batch: int, generator: torch.Generator) -> Tensor:
        """(B,) the scale after which a sample is decoded."""
        last = self.schedule.num_scales - 1
        dropped = torch.rand(batch, device=self.device, generator=generator) < self.scale_dropout
        earlier = torch.randint(max(last, 1), (batch,), device=self.device, generator=generator)
        return torch.where(dropped, earlier, last)

    def _loss(self, passed: AliasPass) -> tuple[Tensor, Tensor]:
        pairs = zip(passed.reconstructions, passed.targets, strict=True)
        pixel = torch.stack([pixel_loss(x, y, *self.pixel_weights) for x, y in pairs]).mean()
        return pixel + self.vq_weight * passed.loss, pixel

    def on_fit_start(self) -> None:
        """Bring the frozen network to the device."""
        for network in self._perceptual:
            network.to(self.device)

    def on_train_start(self) -> None:
        """Refuse batches that are too small to initialise the codebook; warn of a run that ends before."""
        codebook, loader = self.tokenizer.codebook, self.trainer.train_dataloader
        if isinstance(loader, DataLoader) and codebook.updates <= codebook.warmup_steps:
            images = min(loader.batch_size or 1, len(cast(Sized, loader.sampler))) * self.trainer.world_size
            codebook.check_pool([images * side**2 for side in self.schedule.patch_nums[: self.scales]])
        if codebook.warmup_steps >= self.trainer.estimated_stepping_batches:
            rank_zero_warn(
                f"warmup_steps {codebook.warmup_steps} leaves no step of the run's "
                f"{self.trainer.estimated_stepping_batches} to set the codes in: stage 2 cannot use this tokenizer"
            )

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One step of tokenizer and discriminator together; logs every term as ``train/*``."""
        key = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        passed = self._pass(batch, batch_generator(self.device, *key))
        loss, pixel = self._loss(passed)
        terms = {"pixel": pixel, "vq": passed.loss}
        for network in self._perceptual:
            # LPIPS takes no value beyond the range, a blurred image has some by rounding
            terms["perceptual"] = network(passed.reconstructions[0].clamp(-1, 1), passed.targets[0].clamp(-1, 1))
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.texture_weight:
            terms["texture"] = texture_loss(passed.reconstructions[0], passed.targets[0])
            loss = loss + self.texture_weight * terms["texture"]
        if self.discriminator is not None:
            loss = loss + self._adversarial(self.discriminator, passed, loss, terms)
        self.log_dict({f"train/{k}": v for k, v in {"loss": loss, **terms}.items()}, prog_bar=True)
        return loss

    def _adversarial(
        self, discriminator: nn.Module, passed: AliasPass, loss: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """Both sides of the game as one loss: neither reaches the other's weights, so one optimiser serves both."""
        if self.global_step < self.adversarial_start * self.trainer.estimated_stepping_batches:
            # DistributedDataParallel wants a gradient for every weight
            return sum((0 * p.sum() for p in discriminator.parameters()), loss.new_zeros(()))
        assert isinstance(self.tokenizer, VQVAE)
        real, fake = passed.targets[0], passed.reconstructions[0]
        terms["generator"] = generator_loss(discriminator, fake)
        terms["discriminator"] = discriminator_loss(discriminator, real, fake)
        weight = adaptive_weight(loss, terms["generator"], self.tokenizer.decoder.conv_out.weight)
        return self.adversarial_weight * weight * terms["generator"] + terms["discriminator"]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        """Accumulate ``val/loss``, PSNR or SNR, and code usage; hands callbacks the ``reconstructions``."""
        passed = self._pass(batch, None)
        loss, _ = self._loss(passed)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(batch.images))
        self.usage.update(passed.indices)
        self.snr.update(passed.reconstructions, passed.targets)
        if isinstance(self.tokenizer, VQVAE):
            self.psnr.update(passed.reconstructions[0].clamp(-1, 1), passed.targets[0])
        return {"reconstructions": passed.reconstructions}

    @torch.no_grad()
    def reconstruct(self, batch: ImageBatch) -> list[Tensor]:
        """The structure tokenizer's image of every focus state, without noise: K tensors (B, 3, H, W) in [-1, 1].

        The image of a state is decoded from the tokens up to its last scale.

        Raises:
            ValueError: for an alias tokenizer, which has no images.
        """
        if not isinstance(self.tokenizer, VQVAE):
            raise ValueError("reconstruct needs a structure tokenizer, this task's is one of alias residuals")
        stages = self.tokenizer(self._inputs(batch, None)).stages
        return [self.tokenizer.decode_features(stages[s]).clamp(-1, 1) for s in self.schedule.last_scales]

    def on_validation_epoch_end(self) -> None:
        """Log ``val/usage/*`` and ``val/psnr`` (structure) or ``val/snr/*`` per scale (alias), in dB."""
        usage = self.usage.compute()
        sides = self.schedule.patch_nums[: self.scales]
        self.log_dict({f"val/usage/{n}x{n}": u for n, u in zip(sides, usage[:-1], strict=True)})
        self.log("val/usage/all", usage[-1], prog_bar=True)
        self.usage.reset()
        if isinstance(self.tokenizer, VQVAE):
            self.log("val/psnr", self.psnr.compute(), prog_bar=True)
            self.psnr.reset()
        else:
            self.log_dict({f"val/snr/{n}x{n}": x for n, x in zip(sides, self.snr.compute(), strict=True)})
        self.snr.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with a learning rate that warms up and then falls linearly."""
        groups = parameter_groups([self.tokenizer])
        if self.discriminator is not None:
            # without decay, which would also wear it while it waits for its start
            groups.append({"params": list(self.discriminator.parameters()), "weight_decay": 0.0})
        optimizer = self.optimizer_factory(groups)
        steps = training_steps(self.trainer)
        scheduler = warmup_linear(optimizer, steps, *self.lr_plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _noisy(views: Sequence[Tensor], deviations: Sequence[float], generator: torch.Generator | None) -> list[Tensor]:
    """Views plus Gaussian noise of the given standard deviations; as they are without a generator."""
    if generator is None:
        return list(views)
    pairs = zip(views, deviations, strict=True)
    return [v + b * torch.randn(v.shape, device=v.device, generator=generator) for v, b in pairs]
