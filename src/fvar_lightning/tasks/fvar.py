"""FVARTask: stage 2, the training of teacher and student on tokens, and sampling with the student.

Legend: B batch, S scales, L tokens of all scales, Z latent channels.
"""

from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from fvar_lightning.data.batches import ImageBatch, SampleBatch, TokenBatch
from fvar_lightning.data.modules import TokenDataModule
from fvar_lightning.data.tokens import TokenMeta
from fvar_lightning.generation.sampling import generate, generate_stages
from fvar_lightning.tasks.finite import FiniteTask
from fvar_lightning.tasks.sharding import gathered, shard
from fvar_lightning.tasks.training import (
    batch_generator,
    check_views,
    parameter_groups,
    training_steps,
    warmup_linear,
)
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.build import Tokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.losses import feature_loss, token_losses
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.checkpoints import load_initial_weights, load_tokenizer
from fvar_lightning.weights.describe import build, describe, differences


def _tokenizer(source: str | dict[str, Any]) -> Tokenizer:
    """From a checkpoint, or from a description, frozen."""
    if isinstance(source, str):
        return load_tokenizer(source)
    tokenizer = build(source)
    if isinstance(tokenizer, VAR):
        raise ValueError("a tokenizer is described as a transformer")
    return tokenizer.requires_grad_(False).eval()


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW as VAR is trained."""
    return torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)


class StepInputs(NamedTuple):
    """What the networks of a stage-2 step read."""

    labels: Tensor
    """(B,), some of them dropped."""
    inputs: Tensor
    """(B, L - pn_1^2, Z), see `VAR`."""
    targets: Tensor
    """(B, L) structure tokens."""
    alias: Tensor | None
    """(B, L, Z_a) alias codebook vectors, where there is a teacher."""
    keep: Tensor | None
    """(depth, B, 2), see `VAR.keep_masks`."""


class FVARTask(FiniteTask):
    """Trains the student, and the teacher that distils the alias tokens into it (paper section 3.6, eq. 12).

        loss = CE(student) + teacher_loss_weight * CE(teacher)
             + feature_weight * MSE(features) + logit_weight * KL(teacher || student)

    Takes batches of `ImageDataModule` or `TokenDataModule`. The tokenizers are frozen and travel in the checkpoint.
    With the three weights at 0 there is no teacher: plain VAR.

    Args:
        structure_tokenizer: checkpoint of the structure tokenizer; in this task's own checkpoints, which hold the
            tokenizers, its description.
        alias_tokenizer: the same of the alias tokenizer; without one the alias residuals go through the structure
            tokenizer (needs targets ``view``).
        initial_weights: start the student from these: official VAR's file, a checkpoint of this task or a pretrained
            folder; class embeddings are new where the number of classes differs.
        num_classes: from the data module.
        class_names: from the data module.
        depth, width, heads, drop_path_rate, shared_aln, attn_l2_norm: of the student, see `VAR`.
        trunk, alias_blocks, alias_scales, alias_context: of the teacher, see `HighFrequencyTeacher`.
        teacher_loss_weight: of the teacher's own cross-entropy.
        feature_weight: of the feature distillation (lambda_feat).
        logit_weight: of the logit distillation (lambda_logit).
        feature_blocks: how many of the last blocks are compared.
        label_dropout: probability that a label becomes the class-free one.
        guidance, top_k, top_p: of `generate`, for prediction.
        optimizer: of student and teacher.
        lr_warmup: part of the run during which the learning rate rises.
        lr_final: learning rate at the end over its peak.
        seed: of label dropout and stochastic depth.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        structure_tokenizer: str | dict[str, Any],
        alias_tokenizer: str | dict[str, Any] | None = None,
        initial_weights: str | None = None,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        drop_path_rate: float | None = None,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        trunk: Literal["shared", "separate"] = "shared",
        alias_blocks: int = 2,
        alias_scales: int | None = None,
        alias_context: Literal["causal", "own_scale"] = "causal",
        teacher_loss_weight: float = 1.0,
        feature_weight: float = 1.0,
        logit_weight: float = 0.5,
        feature_blocks: int = 1,
        label_dropout: float = 0.1,
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup: float = 0.02,
        lr_final: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        weights = {
            "teacher_loss_weight": teacher_loss_weight,
            "feature_weight": feature_weight,
            "logit_weight": logit_weight,
        }
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if teacher_loss_weight == 0 and (feature_weight or logit_weight):
            raise ValueError(
                "teacher_loss_weight 0 leaves the teacher untrained: "
                f"feature_weight and logit_weight must be 0 too, got {feature_weight} and {logit_weight}"
            )
        if not 1 <= feature_blocks <= alias_blocks:
            raise ValueError(f"feature_blocks must lie in 1..{alias_blocks} (alias_blocks), got {feature_blocks}")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {label_dropout}")
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer_factory = optimizer
        self.teacher_loss_weight, self.feature_weight, self.logit_weight = weights.values()
        self.feature_blocks, self.label_dropout, self.seed = feature_blocks, label_dropout, seed
        self.lr_plan = lr_warmup, lr_final
        self.sampling = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
        vae = _tokenizer(structure_tokenizer)
        if not isinstance(vae, VQVAE):
            raise ValueError(f"structure_tokenizer {structure_tokenizer!r} holds an alias tokenizer")
        self.vae = vae
        self.alias_tokenizer = self._load_alias(alias_tokenizer)
        # a checkpoint stands alone: it holds these weights
        self.hparams["structure_tokenizer"] = describe(vae)
        self.hparams["alias_tokenizer"] = None if self.alias_tokenizer is None else describe(self.alias_tokenizer)
        self.hparams["initial_weights"] = None
        self.student = VAR(
            vae.schedule.patch_nums,
            vocab_size=vae.vocab_size,
            z_channels=vae.z_channels,
            num_classes=num_classes,
            depth=depth,
            width=width,
            heads=heads,
            drop_path_rate=drop_path_rate,
            shared_aln=shared_aln,
            attn_l2_norm=attn_l2_norm,
        )
        if initial_weights is not None:
            load_initial_weights(self.student, initial_weights)
        self.teacher: HighFrequencyTeacher | None = None
        if teacher_loss_weight > 0:
            self.teacher = HighFrequencyTeacher(
                self.student,
                alias_channels=self._alias_source.z_channels,
                alias_blocks=alias_blocks,
                alias_scales=alias_scales,
                alias_context=alias_context,
                trunk=trunk,
            )

    def _load_alias(self, source: str | dict[str, Any] | None) -> AliasTokenizer | None:
        if source is None:
            return None
        tokenizer = _tokenizer(source)
        if not isinstance(tokenizer, AliasTokenizer):
            raise ValueError(f"alias_tokenizer {source!r} holds a structure tokenizer")
        for name in ("schedule", "psf"):
            ours, theirs = getattr(self.vae, name), getattr(tokenizer, name)
            if ours not in (theirs, None):
                raise ValueError(
                    f"{name} of the two tokenizers must be equal: structure_tokenizer {ours}, alias_tokenizer {theirs}"
                )
        return tokenizer

    @property
    def _alias_source(self) -> AliasTokenizer | VQVAE:
        """What turns alias residuals into tokens."""
        return self.vae if self.alias_tokenizer is None else self.alias_tokenizer

    def configure_model(self) -> None:
        """Shard student and teacher where the strategy is FSDP2 (`ModelParallelStrategy`)."""
        if self.device_mesh is not None:
            shard(self.student, self.teacher, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Refuse a data module of other views, or of other tokens."""
        check_views(self, self.vae.schedule, self._alias_source.psf)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TokenDataModule):
            self._check_tokens(data.train.meta)

    def _check_tokens(self, meta: TokenMeta) -> None:
        own = self.token_meta()
        for name in ("patch_nums", "structure_vocab", "alias_vocab"):
            cached, wanted = getattr(meta, name), getattr(own, name)
            if cached != wanted and not (name == "alias_vocab" and wanted == 0):
                raise ValueError(f"{name} of the token cache must be the tokenizers' {wanted}, got {cached}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how to build the deployed networks, so that `fvar export` can without the tokenizer files."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["networks"] = {"student": describe(self.student), "vae": describe(self.vae)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another student.

        Raises:
            ValueError: naming the sizes that differ.
        """
        sizes = {name: x for name, x in describe(self.student).items() if name != "drop_path_rate"}
        if differing := differences(checkpoint.get("networks", {}).get("student", {}), sizes):
            raise ValueError(f"the checkpoint is of another student: {differing}")

    def on_fit_start(self) -> None:
        """Refuse tokenizers that are described but came with no checkpoint.

        Raises:
            ValueError: saying what is missing.
        """
        if self.vae.codebook.warming_up:
            raise ValueError("structure_tokenizer is a description without weights: give its checkpoint")

    def train(self, mode: bool = True) -> "FVARTask":
        """Training mode, but never for the frozen tokenizers."""
        super().train(mode)
        self.vae.eval()
        if self.alias_tokenizer is not None:
            self.alias_tokenizer.eval()
        return self

    @torch.no_grad()
    def tokens(self, batch: ImageBatch | TokenBatch) -> TokenBatch:
        """The token maps of a batch; alias tokens only where a teacher reads them."""
        if isinstance(batch, TokenBatch):
            return batch
        with torch.autocast(self.device.type, enabled=False):
            structure = self.vae.encode(self.vae.inputs(batch.images, batch.views, batch.blurred))
            alias = self._alias_source.encode(batch.views.alias) if self.teacher is not None else []
        return TokenBatch(structure, alias, batch.labels)

    def losses(self, batch: TokenBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """All terms, and their weighted sum as ``loss``; where a generator is given it draws which labels and which
        branches are dropped."""
        return self.terms(self.step_inputs(batch, generator))

    def step_inputs(self, batch: TokenBatch, generator: torch.Generator | None = None) -> StepInputs:
        """What a step draws and looks up before the networks run."""
        labels, keep, alias = batch.labels, None, None
        if generator is not None:
            dropped = torch.rand(len(labels), device=labels.device, generator=generator) < self.label_dropout
            labels = torch.where(dropped, self.student.num_classes, labels)
            keep = self.student.keep_masks(len(labels), generator)
        if self.teacher is not None:
            alias = self._alias_source.codes(torch.cat(list(batch.alias), dim=1))
        targets = torch.cat(list(batch.structure), dim=1)
        return StepInputs(labels, self.vae.var_inputs(batch.structure), targets, alias, keep)

    def terms(self, step: StepInputs) -> dict[str, Tensor]:
        """The terms of `losses`: a function of tensors alone."""
        labels, inputs, targets, alias, keep = step
        trace = self.student.trace(labels, inputs, keep)
        readout = self.student.readout(trace.hidden[-1], trace.condition)
        if self.teacher is None or alias is None:
            loss = token_losses(targets, readout)[0]
            return {"student": loss, "loss": loss}
        taught = self.teacher(self.student, trace, labels, inputs, alias, keep)
        terms = dict(zip(("student", "teacher", "logit"), token_losses(targets, readout, taught.readout), strict=True))
        n = self.feature_blocks
        terms["feature"] = feature_loss(trace.hidden[-n:], taught.hidden[-n:])
        terms["loss"] = (
            terms["student"]
            + self.teacher_loss_weight * terms["teacher"]
            + self.feature_weight * terms["feature"]
            + self.logit_weight * terms["logit"]
        )
        return terms

    def training_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> Tensor:
        """One step; logs every term as ``train/*``."""
        key = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        terms = self.losses(self.tokens(batch), batch_generator(self.device, *key))
        self.report(terms, batch_idx)
        self.log_dict({f"train/{k}": v for k, v in terms.items()}, prog_bar=True)
        return terms["loss"]

    def validation_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> None:
        """Log every term as ``val/*``."""
        terms = self.losses(self.tokens(batch))
        values = {f"val/{k}": v for k, v in terms.items()}
        self.log_dict(values, sync_dist=True, prog_bar=True, batch_size=len(batch.labels))

    test_step = validation_step

    def generate(self, labels: Tensor, **options: Any) -> Tensor:
        """Images of the labels by the student, with the task's guidance, top_k and top_p; see `generate`."""
        with gathered(self.student):
            return generate(self.student, self.vae, labels, **(self.sampling | options))

    def generate_stages(self, labels: Tensor, **options: Any) -> list[Tensor]:
        """The image after every scale, S tensors (B, 3, H, W); takes what `generate` takes."""
        with gathered(self.student):
            return generate_stages(self.student, self.vae, labels, **(self.sampling | options))

    def predict_step(self, batch: SampleBatch | ImageBatch, batch_idx: int) -> Tensor | TokenBatch:
        """Images (B, 3, H, W) for a `SampleBatch`, tokens for an `ImageBatch` (token caches)."""
        if isinstance(batch, SampleBatch):
            return self.generate(batch.labels, seeds=batch.seeds)
        return self.tokens(batch)

    def token_meta(self) -> TokenMeta:
        """What a cache of this task's tokens holds."""
        return TokenMeta(
            patch_nums=self.vae.schedule.patch_nums,
            class_names=self.class_names,
            structure_vocab=self.vae.vocab_size,
            alias_vocab=self._alias_source.vocab_size if self.teacher is not None else 0,
        )

    @property
    def class_names(self) -> list[str]:
        """Name of every label; its number where there is none."""
        return self.hparams["class_names"] or [str(label) for label in range(self.student.num_classes)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with a learning rate that warms up and then falls linearly."""
        modules = [m for m in (self.student, self.teacher) if m is not None]
        optimizer = self.optimizer_factory(parameter_groups(modules))
        steps = training_steps(self.trainer)
        scheduler = warmup_linear(optimizer, steps, *self.lr_plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
