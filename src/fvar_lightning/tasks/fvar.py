"""FVARTask: stage 2, the training of teacher and student on tokens, and sampling with the student.

Legend: B batch, S scales, L tokens of all scales, Z latent channels.
"""

from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from fvar_lightning.checks import check_not_negative
from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.tasks.stage2 import Stage2Task
from fvar_lightning.tasks.training import (
    WarmupLinear,
    batch_generator,
    check_lr_plan,
    check_seed,
    parameter_groups,
    prefix,
    ramp,
    training_steps,
)
from fvar_lightning.tokenizer.corruption import corrupted
from fvar_lightning.transformer.losses import feature_loss, token_losses
from fvar_lightning.transformer.teacher import AliasContext, Trunk
from fvar_lightning.weights.pretrained import check_sampling


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
    distillation: Tensor
    """(), factor on the distillation, 0 to 1."""


class FVARTask(Stage2Task):
    """Trains the student, and the teacher that distils the alias tokens into it (paper section 3.6, eq. 12).

        loss = CE(student) + teacher_loss_weight * CE(teacher)
             + distillation * (feature_weight * MSE(features) + logit_weight * KL(teacher || student))

    Takes batches of `ImageDataModule` or `TokenDataModule`. The tokenizers are frozen and travel in the checkpoint.
    With the three weights at 0 there is no teacher: plain VAR.

    Args:
        structure_tokenizer: checkpoint of the structure tokenizer; in this task's own checkpoints, which hold the
            tokenizers, its description.
        alias_tokenizer: the same of the alias tokenizer; without one the alias residuals go through the structure
            tokenizer (needs targets ``view``).
        initial_weights: start the student from these: official VAR's file, a checkpoint of this task or a pretrained
            folder; class embeddings are new where the number of classes differs.
        num_classes: None: those of the trainer's data module, whose schedule the tokenizers then serve too (see
            `at_schedule`); student and teacher are built when the trainer asks for them (`configure_model`).
        class_names: name of every label; the data module's where left out.
        depth: number of the student's blocks.
        width: channels of a token in the student; ``None`` is 64 * depth.
        heads: attention heads of the student; ``None`` is width / 64.
        drop_path_rate: stochastic depth of the last block, rising linearly; ``None`` is 0.1 * depth / 24.
        shared_aln: one AdaLN modulation for all blocks, as in official VAR's d36.
        attn_l2_norm: cosine attention, as in all official weights.
        initial_gain: how far the residual branches are open at the start; see `VAR` for official values.
        recompute: keep only the inputs of every block for the backward pass: a third more work for less memory.
        trunk: ``shared``: the teacher doubles the student's last blocks; ``detached``: the same, but its
            loss does not train what they share; ``separate``: it is a whole second network.
        alias_blocks: how many of the teacher's last blocks read alias tokens.
        alias_scales: on how many of the last scales they do; ``None``: on all.
        alias_context: which alias tokens a token may see: ``causal``: those of its own scale and of earlier ones;
            ``own_scale``: eq. 9 to the letter; ``next``: those of the next scale too; ``all``: of every scale.
        sharp_alias: have the teacher read the alias tokens of sharp views too, whose residual is zero: more than a
            third of all, and of them nothing but their position and level.
        teacher_loss_weight: of the teacher's own cross-entropy.
        feature_weight: of the feature distillation (lambda_feat).
        logit_weight: of the logit distillation (lambda_logit).
        feature_blocks: how many of the last blocks are compared.
        distill_start: part of the run after which the student is distilled into; until then it and the teacher learn
            from the tokens alone.
        distill_ramp: part of the run during which the distillation then rises linearly to its weights.
        distill_stop: part of the run after which nothing is distilled any more.
        token_corruption: largest share of an image's tokens that are replaced by neighbours in training, while the
            targets after them put it right (`corrupted`); every image draws a share up to it. 0: none.
        label_dropout: probability that a label becomes the null class.
        guidance: strength of classifier-free guidance when generating, at the last scale.
        top_k: generating draws from so many of the likeliest tokens; 0: from all.
        top_p: and of these from the likeliest that hold this probability; 0: from all.
        optimizer: of student and teacher; a class of `torch.optim` and its arguments.
        lr_warmup: part of the run during which the learning rate rises.
        lr_hold: part of the rest during which it stays at its peak.
        lr_final: learning rate at the end over its peak.
        weight_decay_final: weight decay at the end, to which the optimiser's changes by half a cosine; ``None``: none
            of it changes.
        seed: of label dropout, stochastic depth and wrong tokens.
        compile: the blocks of student and teacher, each by itself, with `torch.compile`: training and validation, not
            sampling. The time to compile does not grow with the depth.
        deferred: build student and teacher when the trainer asks for them (`configure_model`) even if `num_classes` is
            given, so that with `ModelParallelStrategy` no process but the first ever holds all of them.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        structure_tokenizer: str | dict[str, Any],
        alias_tokenizer: str | dict[str, Any] | None = None,
        initial_weights: str | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        drop_path_rate: float | None = None,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        initial_gain: float = 1e-5,
        recompute: bool = False,
        trunk: Trunk = "shared",
        alias_blocks: int = 2,
        alias_scales: int | None = None,
        alias_context: AliasContext = "causal",
        sharp_alias: bool = False,
        teacher_loss_weight: float = 1.0,
        feature_weight: float = 1.0,
        logit_weight: float = 0.5,
        feature_blocks: int = 1,
        distill_start: float = 0.0,
        distill_ramp: float = 0.0,
        distill_stop: float = 1.0,
        token_corruption: float = 0.0,
        label_dropout: float = 0.1,
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup: float = 0.02,
        lr_hold: float = 0.0,
        lr_final: float = 0.1,
        weight_decay_final: float | None = None,
        seed: int = 0,
        compile: bool = False,
        deferred: bool = False,
    ) -> None:
        super().__init__()
        weights = {
            "teacher_loss_weight": teacher_loss_weight,
            "feature_weight": feature_weight,
            "logit_weight": logit_weight,
        }
        check_not_negative(weights)
        if teacher_loss_weight == 0 and (feature_weight or logit_weight):
            raise ValueError(
                "teacher_loss_weight 0 leaves the teacher untrained: "
                f"feature_weight and logit_weight must be 0 too, got {feature_weight} and {logit_weight}"
            )
        if not 1 <= feature_blocks <= alias_blocks:
            raise ValueError(f"feature_blocks must lie in 1..{alias_blocks} (alias_blocks), got {feature_blocks}")
        parts = {"distill_start": distill_start, "distill_ramp": distill_ramp, "distill_stop": distill_stop}
        for name, part in parts.items():
            if not 0 <= part <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {part}")
        if distill_stop < distill_start:
            raise ValueError(f"distill_stop must not be before distill_start {distill_start}, got {distill_stop}")
        if not 0 <= token_corruption <= 1:
            raise ValueError(f"token_corruption must lie in [0, 1], got {token_corruption}")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {label_dropout}")
        check_lr_plan(lr_warmup, lr_final, lr_hold)
        check_seed(seed)
        check_sampling({"guidance": guidance, "top_k": top_k, "top_p": top_p})
        if weight_decay_final is not None and weight_decay_final < 0:
            raise ValueError(f"weight_decay_final must not be negative, got {weight_decay_final}")
        self.save_hyperparameters(ignore=["optimizer", "compile", "deferred"])
        self.optimizer_factory = optimizer
        self.teacher_loss_weight, self.feature_weight, self.logit_weight = weights.values()
        self.feature_blocks, self.label_dropout, self.seed = feature_blocks, label_dropout, seed
        self.distill_plan, self.token_corruption = tuple(parts.values()), token_corruption
        self.lr_plan = lr_warmup, lr_final, lr_hold, weight_decay_final
        self.sampling = {"guidance": guidance, "top_k": top_k, "top_p": top_p}
        self.prepare(structure_tokenizer, alias_tokenizer, initial_weights, compile=compile, deferred=deferred)

    def losses(
        self, batch: TokenBatch, generator: torch.Generator | None = None, distillation: float = 1.0
    ) -> dict[str, Tensor]:
        """All terms, and their weighted sum as ``loss``; where a generator is given it draws which labels and branches
        are dropped, and which tokens go wrong."""
        return self.terms(self.step_inputs(batch, generator, distillation))

    def step_inputs(
        self, batch: TokenBatch, generator: torch.Generator | None = None, distillation: float = 1.0
    ) -> StepInputs:
        """What a step draws and looks up before the networks run."""
        labels, keep, alias = batch.labels, None, None
        if generator is not None:
            dropped = torch.rand(len(labels), device=labels.device, generator=generator) < self.label_dropout
            labels = torch.where(dropped, self.student.num_classes, labels)
            keep = self.student.keep_masks(len(labels), generator)
        if self.teacher is not None:
            alias = self.alias_source.codes(torch.cat(list(batch.alias), dim=1))
        if generator is not None and self.token_corruption > 0:
            shares = self.token_corruption * torch.rand(len(labels), device=labels.device, generator=generator)
            inputs, structure = corrupted(self.vae.quantizer, batch.structure, shares, generator)
        else:
            inputs, structure = self.vae.var_inputs(batch.structure), list(batch.structure)
        factor = torch.full((), distillation, device=labels.device)
        return StepInputs(labels, inputs, torch.cat(structure, dim=1), alias, keep, factor)

    def terms(self, step: StepInputs) -> dict[str, Tensor]:
        """The terms of `losses`: a function of tensors alone."""
        labels, inputs, targets, alias, keep, distillation = step
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
            + distillation * (self.feature_weight * terms["feature"] + self.logit_weight * terms["logit"])
        )
        return terms

    def training_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> Tensor:
        """One step; logs every term as ``train/*``."""
        key = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        passed = self.global_step / training_steps(self.trainer)
        terms = self.losses(self.tokens(batch), batch_generator(self.device, *key), ramp(passed, *self.distill_plan))
        self.report(terms, batch_idx)
        return terms["loss"]

    def validation_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> None:
        """Log every term as ``val/*``; the loss with the distillation at its full weights, at every step of a run."""
        terms = self.losses(self.tokens(batch))
        for name, value in terms.items():
            name, size = f"{prefix(self.trainer)}/{name}", len(batch.labels)
            self.log(name, value, sync_dist=True, prog_bar=name.endswith("/loss"), batch_size=size)

    test_step = validation_step

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Student and teacher by their own norms: how far one is clipped is not to depend on the other."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            return self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for network in (self.student, self.teacher):
            if network is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_val)

    def parameters_to_train(self) -> list[dict[str, Any]]:
        """Groups for the optimiser."""
        return parameter_groups(m for m in (self.student, self.teacher) if m is not None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with a learning rate that warms up and then falls linearly, and with its weight decay."""
        optimizer = self.optimizer_factory(self.parameters_to_train())
        steps = training_steps(self.trainer)
        scheduler = WarmupLinear(optimizer, steps, *self.lr_plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
