"""AliasTokenizerTask: the training of the alias tokenizer Q_A (stage 1)."""

from dataclasses import asdict

import torch
from lightning.pytorch.cli import OptimizerCallable

from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.metrics.tokenizer import SignalToNoise
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.stage1 import Stage1Task, default_optimizer
from fvar_lightning.tasks.training import compile_each, prefix
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.reconstruction import Reconstruction


class AliasTokenizerTask(Stage1Task):
    """Trains an `AliasTokenizer` on the alias residuals of `ImageDataModule`: plain pixel losses at unit variance.

    Args:
        schedule: token layout and focus states; equal to the data module's.
        psf: point-spread function; the data module's.
        vocab_size: codes in the codebook.
        z_channels: channels of a code.
        ch: channels of encoder and decoder.
        num_res_blocks: residual blocks of the encoder, and of the decoder.
        decay: of the moving averages that the codes are, over steps.
        warmup_steps: first steps, without quantiser; the codes are set after them.
        revive_after: steps without use after which a code is replaced by a vector of the current one.
        l1_weight: of the mean absolute error of the pixels.
        l2_weight: of the mean squared error of the pixels.
        vq_weight: of the commitment loss.
        optimizer: of all parameters; a class of `torch.optim` and its arguments.
        lr_warmup: part of the run during which the learning rate rises.
        lr_final: learning rate at the end over its peak.
        compile: encoder and decoder with `torch.compile`. The codebook stays as it is.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    tokenizer: AliasTokenizer

    def __init__(
        self,
        schedule: FocusSchedule = FocusSchedule(),  # noqa: B008 - frozen
        psf: str = "disk",
        vocab_size: int = 512,
        z_channels: int = 64,
        ch: int = 128,
        num_res_blocks: int = 1,
        decay: float = 0.99,
        warmup_steps: int = 1000,
        revive_after: int = 200,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        vq_weight: float = 1.0,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup: float = 0.02,
        lr_final: float = 0.01,
        compile: bool = False,
    ) -> None:
        schedule = FocusSchedule.of(schedule)
        blurred = schedule.num_scales - Refocus(schedule, psf).sharp_scales
        if not blurred:
            raise ValueError(
                f"schedule must have radii at which psf {psf!r} blurs, got {schedule.radii}: there is no alias residual"
            )
        tokenizer = AliasTokenizer(
            schedule,
            psf=psf,
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            num_res_blocks=num_res_blocks,
            decay=decay,
            warmup_steps=warmup_steps,
            revive_after=revive_after,
        )
        super().__init__(
            tokenizer,
            blurred,
            l1_weight=l1_weight,
            l2_weight=l2_weight,
            vq_weight=vq_weight,
            optimizer=optimizer,
            lr_warmup=lr_warmup,
            lr_final=lr_final,
            seed=0,
        )
        self.save_hyperparameters(ignore=["optimizer", "compile"])
        self.hparams["schedule"] = asdict(schedule)
        self.snr = SignalToNoise(self.scales)
        if compile:
            compile_each([tokenizer.encoder, tokenizer.decoder], dynamic=True)  # one size a scale

    def run(self, batch: ImageBatch, generator: torch.Generator | None) -> Reconstruction:
        """The residuals of all scales that are blurred; the others have none."""
        return self.tokenizer(batch.views.alias[: self.scales])

    def judge(self, passed: Reconstruction) -> None:
        """Signal-to-noise ratio of every scale."""
        self.snr.update(passed.decoded, passed.targets)

    def log_figures(self) -> None:
        """Log ``val/snr/*`` per scale, in dB (``test/snr/*`` in a test)."""
        pairs = zip(self.schedule.patch_nums, self.snr.compute(), strict=False)
        self.log_dict({f"{prefix(self.trainer)}/snr/{n}x{n}": x for n, x in pairs})
