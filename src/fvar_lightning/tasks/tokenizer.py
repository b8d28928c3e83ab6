"""TokenizerTask: the training of the structure tokenizer Q_L (stage 1)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio

from fvar_lightning.checks import check_choice, check_not_negative
from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.stage1 import Stage1Task, default_optimizer
from fvar_lightning.tasks.training import compile_each, prefix
from fvar_lightning.tokenizer.losses import (
    TEXTURE_WINDOW,
    Discriminator,
    Perceptual,
    adaptive_weight,
    build_discriminator,
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    texture_loss,
)
from fvar_lightning.tokenizer.quantizer import Quantized
from fvar_lightning.tokenizer.reconstruction import Reconstruction
from fvar_lightning.tokenizer.vqvae import VQVAE, Targets


class TokenizerTask(Stage1Task):
    """Trains a `VQVAE` on the batches of `ImageDataModule`.

    Args:
        schedule: token layout and focus states; equal to the data module's.
        psf: point-spread function; the data module's.
        targets: what a token map stands for, see `VQVAE`.
        vocab_size: codes in the codebook.
        z_channels: channels of a code.
        ch: channels of encoder and decoder at full resolution.
        ch_mult: channels at every resolution over `ch`, full size first; each but the last halves the side.
        num_res_blocks: residual blocks of the encoder at every resolution; the decoder has one more.
        norm_groups: groups of the group normalisation; where they do not divide a layer's channels, as many as do.
        decay: of the moving averages that the codes are, over steps.
        warmup_steps: first steps, without quantiser; the codes are set after them.
        revive_after: steps without use after which a code is replaced by a vector of the current one.
        l1_weight: of the mean absolute error of the pixels.
        l2_weight: of the mean squared error of the pixels.
        vq_weight: of the codebook and commitment loss.
        sharp_commitment: of a commitment that keeps the features of different views together, within the former; see
            `VQVAE`.
        perceptual: network of the perceptual loss: ``none``, ``lpips`` or ``efficientnet_lite1``; see
            `perceptual_loss`.
        perceptual_weight: of the perceptual loss.
        texture_weight: of the loss on the local contrast of fine detail (`texture_loss`); 0: none.
        texture_octaves: how many times that loss looks at the image at half the size too, where coarser detail lies.
        adversarial_weight: of the discriminator's opinion, on top of the adaptive weight; 0: none.
        adversarial_start: part of the run before the discriminator joins.
        discriminator: ``patch``: `PatchDiscriminator`; ``efficientnet_lite1``: `FeatureDiscriminator`.
        discriminator_ch: channels of the discriminator's first layer.
        scale_dropout: probability that a sample is decoded after an earlier scale, against the focus state of that
            scale, so that a partial token sequence decodes to a blurred image.
        noise: standard deviation of the noise on the input at the first and the last scale (beta of the paper), in
            training only and never on a target.
        optimizer: of all parameters; a class of `torch.optim` and its arguments.
        lr_warmup: part of the run during which the learning rate rises.
        lr_final: learning rate at the end over its peak.
        seed: of noise and scale dropout.
        compile: encoder and decoder with `torch.compile`, but for the decoder's last layers, of which the adaptive
            weight asks for gradients on their own. The codebook stays as it is.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    tokenizer: VQVAE
    states: Tensor

    def __init__(
        self,
        schedule: FocusSchedule = FocusSchedule(),  # noqa: B008 - frozen
        psf: str = "disk",
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
        sharp_commitment: float = 0.0,
        perceptual: Perceptual = "none",
        perceptual_weight: float = 1.0,
        texture_weight: float = 0.0,
        texture_octaves: int = 0,
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
        compile: bool = False,
    ) -> None:
        schedule = FocusSchedule.of(schedule)
        check_choice("perceptual", perceptual, Perceptual)
        check_choice("discriminator", discriminator, Discriminator)
        check_not_negative({
            "perceptual_weight": perceptual_weight, "texture_weight": texture_weight,
            "texture_octaves": texture_octaves, "adversarial_weight": adversarial_weight,
        })  # fmt: skip
        if not 0 <= scale_dropout < 1:
            raise ValueError(f"scale_dropout must lie in [0, 1), got {scale_dropout}")
        if not 0 <= adversarial_start <= 1:
            raise ValueError(f"adversarial_start must lie in [0, 1], got {adversarial_start}")
        if texture_weight and schedule.image_size < TEXTURE_WINDOW:
            raise ValueError(
                f"texture_weight must be 0 for images below {TEXTURE_WINDOW} px, got {texture_weight} for images of "
                f"{schedule.image_size} px"
            )
        if texture_octaves and not texture_weight:
            raise ValueError(f"texture_octaves must be 0 without texture_weight, got {texture_octaves}")
        if texture_weight and schedule.image_size < TEXTURE_WINDOW << texture_octaves:
            raise ValueError(
                f"texture_octaves must leave {TEXTURE_WINDOW} px of an image, got {texture_octaves} for images of "
                f"{schedule.image_size} px"
            )
        if len(noise) != 2 or not all(deviation >= 0 for deviation in noise):
            raise ValueError(f"noise must be two standard deviations from 0, got {noise}")
        tokenizer = VQVAE(
            schedule,
            targets=targets,
            psf=psf,
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            norm_groups=norm_groups,
            sharp_commitment=sharp_commitment,
            decay=decay,
            warmup_steps=warmup_steps,
            revive_after=revive_after,
        )
        super().__init__(
            tokenizer,
            schedule.num_scales,
            l1_weight=l1_weight,
            l2_weight=l2_weight,
            vq_weight=vq_weight,
            optimizer=optimizer,
            lr_warmup=lr_warmup,
            lr_final=lr_final,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["optimizer", "compile"])
        self.hparams["schedule"] = asdict(schedule)
        self.perceptual_weight = perceptual_weight
        self.texture_weight, self.texture_octaves = texture_weight, texture_octaves
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.scale_dropout, self.noise = scale_dropout, tuple(noise)
        self.register_buffer("states", torch.tensor(schedule.states), persistent=False)
        self.perceptual = perceptual
        # in a list: a frozen network is neither trained nor saved
        self._perceptual: list[nn.Module] = []
        self.discriminator = build_discriminator(discriminator, discriminator_ch) if adversarial_weight > 0 else None
        self.psnr = PeakSignalNoiseRatio(data_range=2.0)
        if compile:
            # views have as many sizes as there are scales
            compile_each([tokenizer.encoder], dynamic=True if targets == "view" else None)
            compile_each([tokenizer.decoder.mid, tokenizer.decoder.up])

    def setup(self, stage: str) -> None:
        """Refuse a data module of other views; for a fit, load the network of the perceptual loss."""
        super().setup(stage)
        if stage == "fit":
            self.load_perceptual()

    def load_perceptual(self) -> None:
        """Load the network of the perceptual loss, on the CPU."""
        self._perceptual = [] if self.perceptual == "none" else [perceptual_loss(self.perceptual)]

    def on_fit_start(self) -> None:
        """Bring the frozen network to the device."""
        for network in self._perceptual:
            network.to(self.device)

    def _inputs(self, batch: ImageBatch, generator: torch.Generator | None) -> Tensor | list[Tensor]:
        """What the tokenizer encodes; with noise where there is a generator."""
        inputs = self.tokenizer.inputs(batch.images, batch.views, batch.blurred)
        if generator is None:
            return inputs
        if isinstance(inputs, Tensor):
            return _noisy([inputs], self.noise[1:], generator)[0]
        return _noisy(inputs, np.linspace(self.noise[0], self.noise[1], len(inputs)).tolist(), generator)

    def run(self, batch: ImageBatch, generator: torch.Generator | None) -> Reconstruction:
        """The image, in training after a random number of scales."""
        quantized = self.quantize(self._inputs(batch, generator))
        f_hat, target = quantized.stages[-1], batch.images
        if generator is not None and self.scale_dropout > 0:
            scale = self._last_scales(len(target), generator)
            rows = torch.arange(len(target), device=self.device)
            f_hat = torch.stack(quantized.stages)[scale, rows]
            target = torch.stack(batch.blurred)[self.states[scale], rows]
        image = self.tokenizer.decode_features(f_hat)
        return Reconstruction([image], [target], quantized.indices, quantized.loss)

    def quantize(self, inputs: Tensor | list[Tensor]) -> Quantized:
        """f_hat after every scale, tokens, and the loss on both; what a subclass may add to."""
        return self.tokenizer(inputs)

    def _last_scales(self, batch: int, generator: torch.Generator) -> Tensor:
        """(B,) the scale after which a sample is decoded."""
        last = self.schedule.num_scales - 1
        dropped = torch.rand(batch, device=self.device, generator=generator) < self.scale_dropout
        earlier = torch.randint(max(last, 1), (batch,), device=self.device, generator=generator)
        return torch.where(dropped, earlier, last)

    def further_losses(self, passed: Reconstruction, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """Perceptual, texture and adversarial terms."""
        (image,), (target,) = passed.decoded, passed.targets
        for network in self._perceptual:
            # LPIPS takes no value beyond the range, a blurred image has some by rounding
            terms["perceptual"] = network(image.clamp(-1, 1), target.clamp(-1, 1))
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.texture_weight:
            terms["texture"] = texture_loss(image, target, self.texture_octaves)
            loss = loss + self.texture_weight * terms["texture"]
        if self.discriminator is not None:
            loss = loss + self._adversarial(self.discriminator, image, target, loss, terms)
        return loss

    def _adversarial(
        self, discriminator: nn.Module, fake: Tensor, real: Tensor, loss: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """Both sides of the game as one loss: neither reaches the other's weights, so one optimiser serves both."""
        start = self.adversarial_start
        if start > 0 and self.global_step < start * self.trainer.estimated_stepping_batches:
            # DistributedDataParallel wants a gradient for every weight
            return sum((0 * p.sum() for p in discriminator.parameters()), loss.new_zeros(()))
        terms["generator"] = generator_loss(discriminator, fake)
        terms["discriminator"] = discriminator_loss(discriminator, real, fake)
        weight = adaptive_weight(loss, terms["generator"], self.tokenizer.decoder.conv_out.weight)
        return self.adversarial_weight * weight * terms["generator"] + terms["discriminator"]

    def judge(self, passed: Reconstruction) -> None:
        """PSNR of the image."""
        self.psnr.update(passed.decoded[0].clamp(-1, 1), passed.targets[0])

    def log_figures(self) -> None:
        """Log ``val/psnr``, in dB (``test/psnr`` in a test)."""
        self.log(f"{prefix(self.trainer)}/psnr", self.psnr.compute(), prog_bar=True)

    @torch.no_grad()
    def reconstruct(self, batch: ImageBatch) -> list[Tensor]:
        """The image of every focus state, without noise: K tensors (B, 3, H, W) in [-1, 1].

        The image of a state is decoded from the tokens up to its last scale.
        """
        stages = self.tokenizer(self._inputs(batch, None)).stages
        return [self.tokenizer.image(stages[s]) for s in self.schedule.last_scales]

    def parameters_to_train(self) -> list[dict[str, Any]]:
        """The discriminator's too, without decay, which would also wear it while it waits for its start."""
        groups = super().parameters_to_train()
        if self.discriminator is not None:
            groups.append({"params": list(self.discriminator.parameters()), "weight_decay": 0.0})
        return groups


def _noisy(views: Sequence[Tensor], deviations: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Views plus Gaussian noise of the given standard deviations."""
    pairs = zip(views, deviations, strict=True)
    return [v + b * torch.randn(v.shape, device=v.device, generator=generator) for v, b in pairs]
