"""Tasks that the ablation tries: other things to copy, and other ways to read the alias tokens.

Legend: B batch, L tokens of all scales, L_a alias tokens that are read, C width, V structure codebook.
"""

from typing import Any

import torch
import torch.nn.functional as F
from controls import SelfDistilled
from einops import rearrange
from torch import Tensor, nn

from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask, StepInputs
from fvar_lightning.tasks.sharding import Networks
from fvar_lightning.tasks.training import parameter_groups
from fvar_lightning.transformer.losses import token_losses
from fvar_lightning.transformer.teacher import AliasGatedCrossAttention, Reading

SOFTNESS = 0.3
"""Part of the loss that is on soft targets."""


def likeness_loss(own: Tensor, known: Tensor) -> Tensor:
    """1 - cosine, averaged over tokens; the second is not moved."""
    return 1 - F.cosine_similarity(own, known.detach(), dim=-1).mean()


class Projected(FVARTask):
    """A projector makes of the student's middle what is to be found in it (as in REPA, arXiv 2410.06940)."""

    def _networks(self) -> Networks:
        student, teacher = super()._networks()
        self.projector = nn.Sequential(
            nn.Linear(student.width, student.width), nn.SiLU(), nn.Linear(student.width, student.width)
        )
        return student, teacher

    def parameters_to_train(self) -> list[dict[str, Any]]:
        return super().parameters_to_train() + parameter_groups([self.projector])


class InnerCopy(Projected):
    """The teacher's last features are to be found, by a projector, in the student's middle; nothing else is copied."""

    def terms(self, step: StepInputs) -> dict[str, Tensor]:
        trace = self.student.trace(step.labels, step.inputs, step.keep)
        readout = self.student.readout(trace.hidden[-1], trace.condition)
        assert self.teacher is not None
        assert step.alias is not None
        taught = self.teacher(self.student, trace, step.labels, step.inputs, step.alias, step.keep)
        own = token_losses(step.targets, readout, taught.readout)
        terms = dict(zip(("student", "teacher", "logit"), own, strict=True))
        terms["feature"] = likeness_loss(self.projector(trace.hidden[self.student.depth // 2]), taught.hidden[-1])
        terms["loss"] = (
            terms["student"]
            + self.teacher_loss_weight * terms["teacher"]
            + step.distillation * self.feature_weight * terms["feature"]
        )
        return terms


class SharperInput(Projected, SelfDistilled):
    """The teacher is a moving average of the student that reads the map which holds the answer, that of the next scale:
    what it makes of it in its middle is to be found in the student's."""

    def sharper(self, targets: Tensor) -> Tensor:
        """f_hat after every scale but the first, averaged to its size: (B, L) tokens -> (B, L - pn_1^2, Z)."""
        quantizer = self.vae.quantizer
        stages = quantizer.stages(targets.split([n * n for n in quantizer.patch_nums], dim=1))
        maps = [quantizer.down(f_hat, s) for s, f_hat in enumerate(stages)][1:]
        return torch.cat([rearrange(f, "b c h w -> b (h w) c") for f in maps], dim=1)

    def terms(self, step: StepInputs) -> dict[str, Tensor]:
        trace = self.student.trace(step.labels, step.inputs, step.keep)
        readout = self.student.readout(trace.hidden[-1], trace.condition)
        middle = self.student.depth // 2
        with torch.no_grad():
            known = self.average.trace(step.labels, self.sharper(step.targets)).hidden[middle]
        terms = {"student": token_losses(step.targets, readout)[0]}
        terms["feature"] = likeness_loss(self.projector(trace.hidden[middle]), known)
        terms["loss"] = terms["student"] + step.distillation * self.feature_weight * terms["feature"]
        return terms


class SoftTargets(FVARTask):
    """Part of the loss asks for the codes around the right one too, the nearer the more; without a teacher."""

    def terms(self, step: StepInputs) -> dict[str, Tensor]:
        trace = self.student.trace(step.labels, step.inputs, step.keep)
        log_probs = self.student.logits(trace.hidden[-1], trace.condition).log_softmax(-1)
        hard = F.nll_loss(log_probs.flatten(0, 1), step.targets.flatten())
        soft = -(self.neighbourhood()[step.targets] * log_probs).sum(-1).mean()
        return {"student": hard, "soft": soft, "loss": (1 - SOFTNESS) * hard + SOFTNESS * soft}

    def neighbourhood(self) -> Tensor:
        """Of every code the weights of all, (V, V): a Gaussian as wide as codes lie apart."""
        codes = self.vae.codebook.embedding.weight
        squares = torch.cdist(codes, codes).square()
        apart = squares.fill_diagonal_(torch.inf).amin(1).mean()
        return (-squares.fill_diagonal_(0) / apart).softmax(1)


class AlignedCrossAttention(AliasGatedCrossAttention):
    """Begins by looking at the alias tokens of a token's own place: every head adds minus the squared distance in the
    image, times a weight that it learns, to its scores."""

    def __init__(self, width: int, heads: int, layout: FocusSchedule) -> None:
        super().__init__(width, heads)
        self.log_bias = nn.Parameter(torch.linspace(0, 2, heads))
        places = torch.cat([_centres(n) for n in layout.patch_nums])
        cells = layout.patch_nums[-1] * torch.cdist(places, places)
        self.register_buffer("distances", cells.square(), persistent=False)

    distances: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, reading: Reading) -> Tensor:
        bias = -self.log_bias.exp()[:, None, None] * self.distances[reading.tokens, reading.seen]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _centres(side: int) -> Tensor:
    """Of the cells of a map over the image's side, (side^2, 2)."""
    middle = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(middle, middle)


class ContinuousAlias(FVARTask):
    """A teacher that reads the alias features themselves, before any code takes their place; from images."""

    def tokens(self, batch: ImageBatch | TokenBatch) -> TokenBatch:
        found = super().tokens(batch)
        assert isinstance(batch, ImageBatch)
        tokenizer = self.alias_tokenizer
        assert tokenizer is not None
        with torch.no_grad():
            maps = [tokenizer.encoder(a / tokenizer.std(s)) for s, a in enumerate(batch.views.alias)]
        return found._replace(alias=[rearrange(z, "b c h w -> b (h w) c") for z in maps])

    def step_inputs(
        self, batch: TokenBatch, generator: torch.Generator | None = None, distillation: float = 1.0
    ) -> StepInputs:
        features = torch.cat(list(batch.alias), dim=1)
        anything = [torch.zeros_like(z[..., 0], dtype=torch.long) for z in batch.alias]
        step = super().step_inputs(batch._replace(alias=anything), generator, distillation)
        return step._replace(alias=features)


class AlignedAlias(FVARTask):
    """A teacher whose cross-attention begins at the own place."""

    def _networks(self) -> Networks:
        student, teacher = super()._networks()
        assert teacher is not None
        for block in teacher.blocks:
            block.cross = AlignedCrossAttention(student.width, student.heads, student.layout)
        return student, teacher
