"""HighFrequencyTeacher: the student's architecture with alias-gated cross-attention (paper section 3.5, eq. 9-10).

Legend: B batch, S scales, L tokens of all scales, L_a alias tokens that are read, C width, V structure codebook, Z_a
channels of the alias codebook.
"""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvar_lightning.activations import recomputed
from fvar_lightning.checks import check_choice
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.transformer.layers import AdaLNBlock, merged
from fvar_lightning.transformer.var import VAR, Condition, Readout, Trace

Trunk = Literal["shared", "detached", "separate"]
AliasContext = Literal["own_scale", "causal", "next", "all"]


class TeacherOutput(NamedTuple):
    """What the student is to imitate."""

    hidden: list[Tensor]
    """Outputs of the alias-gated blocks, one (B, L, C) for each."""
    readout: Readout
    """What makes logits of the last of them."""


class Reading(NamedTuple):
    """What a scale reads."""

    tokens: slice
    """Where the scale's tokens lie."""
    seen: slice
    """Where the alias tokens lie that they see."""


class AliasGatedCrossAttention(nn.Module):
    """Z = X + alpha * CrossAttn(X, E_a), alpha = sigmoid(linear([X; CrossAttn])) (eq. 10); attention and gate read X
    after a layer norm, as every block of VAR does.

    The output projection starts at zero, so that the teacher starts as a VAR.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_x = nn.LayerNorm(width, eps=1e-6)
        self.norm_alias = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, alias: Tensor, reads: Sequence[Reading]) -> Tensor:
        """(B, L, C) tokens and (B, L_a, C) alias tokens -> (B, L, C).

        Args:
            reads: scales one after the other; the tokens of others stay as they are.
        """
        h = self.norm_x(x)
        q = rearrange(self.q(h), "b l (h d) -> b h l d", h=self.heads)
        k, v = rearrange(self.kv(self.norm_alias(alias)), "b l (two h d) -> two b h l d", two=2, h=self.heads)
        read = [self.attend(q[:, :, r.tokens], k[:, :, r.seen], v[:, :, r.seen], r) for r in reads]
        first, last = reads[0].tokens.start, reads[-1].tokens.stop
        cross = self.proj(merged(read))
        alpha = torch.sigmoid(self.gate(torch.cat((h[:, first:last], cross), dim=-1)))
        return torch.cat((x[:, :first], x[:, first:last] + alpha * cross, x[:, last:]), dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, reading: Reading) -> Tensor:
        """What the tokens of one scale read: queries (B, heads, l, d), keys and values (B, heads, l_a, d) of the
        alias tokens they see -> (B, heads, l, d)."""
        return F.scaled_dot_product_attention(q, k, v)


class AliasBlock(nn.Module):
    """A copy of a student's block with alias-gated cross-attention between its two branches."""

    def __init__(self, block: AdaLNBlock, width: int, heads: int) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.cross = AliasGatedCrossAttention(width, heads)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        alias: Tensor,
        slices: Sequence[slice],
        reads: Sequence[Reading],
        keep: Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C); the arguments of `AdaLNBlock` and of `AliasGatedCrossAttention`."""
        if recompute:
            return recomputed(self.forward, x, condition, alias, slices, reads, keep)
        block = self.block
        modulation = block.modulation(condition, keep)
        x = block.attend(x, modulation, lambda h: block.attn(h, slices))
        x = self.cross(x, alias, reads)
        return block.feed(x, modulation)


class HighFrequencyTeacher(nn.Module):
    """Predicts the structure tokens with the alias tokens in sight; used in training only.

    It begins as a copy of `student`'s weights and computes exactly what the student computes until its
    cross-attention has learned something. Where the student recomputes its blocks, so does the teacher.

    Args:
        student: the network to be taught.
        alias_channels: Z_a.
        alias_blocks: how many of the last blocks read alias tokens (paper section 4.2: 2).
        alias_scales: how many of the last scales read them; ``None``: all.
        alias_context: which alias tokens a token sees: ``causal``: those of the own scale and earlier ones;
            ``own_scale``: eq. 9 to the letter; ``next``: those of the next scale too; ``all``: of every scale.
        trunk: ``shared``: only the last `alias_blocks` blocks are doubled, the student's others and its head serve
            both; ``detached``: the same, but no gradient of the teacher's reaches what is the student's; ``separate``:
            a whole second network.
        sharp_scales: how many of the last scales have a view without blur, and so an alias residual of zeros: nobody
            reads their tokens.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        student: VAR,
        *,
        alias_channels: int,
        alias_blocks: int = 2,
        alias_scales: int | None = None,
        alias_context: AliasContext = "causal",
        trunk: Trunk = "shared",
        sharp_scales: int = 0,
    ) -> None:
        super().__init__()
        layout: FocusSchedule = student.layout
        alias_scales = layout.num_scales if alias_scales is None else alias_scales
        if not 1 <= alias_blocks <= student.depth:
            raise ValueError(f"alias_blocks must lie in 1..{student.depth} (the student's depth), got {alias_blocks}")
        if not 1 <= alias_scales <= layout.num_scales:
            raise ValueError(f"alias_scales must lie in 1..{layout.num_scales}, got {alias_scales}")
        check_choice("alias_context", alias_context, AliasContext)
        check_choice("trunk", trunk, Trunk)
        if not 0 <= sharp_scales < layout.num_scales:
            raise ValueError(
                f"sharp_scales must lie in 0..{layout.num_scales - 1}, got {sharp_scales}: where no view is blurred, "
                "no alias residual is left for a teacher"
            )
        self.layout, self.detached = layout, trunk == "detached"
        self.alias_length = layout.slices[layout.num_scales - 1 - sharp_scales].stop
        self.reads = _reads(layout.slices, alias_scales, self.alias_length, alias_context)
        if not self.reads:
            raise ValueError(
                f"alias_scales must be more than the {sharp_scales} sharp scales, which have no alias tokens of their "
                f"own, got {alias_scales}"
            )
        self.first = student.depth - alias_blocks
        self.blocks = nn.ModuleList(
            AliasBlock(block, student.width, student.heads)  # type: ignore[arg-type]
            for block in student.blocks[self.first :]
        )
        self.alias_embed = nn.Linear(alias_channels, student.width)
        self.alias_positions = nn.Parameter(torch.empty(1, layout.length, student.width))
        self.alias_levels = nn.Embedding(layout.num_scales, student.width)
        for weight in (self.alias_positions, self.alias_levels.weight):
            nn.init.trunc_normal_(weight, std=(1 / (3 * student.width)) ** 0.5)
        self.register_buffer("level_ids", layout.level_ids(), persistent=False)
        self.network: VAR | None = None
        if trunk == "separate":
            self.network = copy.deepcopy(student)
            # the last blocks live in self.blocks
            self.network.blocks = self.network.blocks[: self.first]

    level_ids: Tensor

    def forward(
        self, student: VAR, trace: Trace, labels: Tensor, inputs: Tensor, alias: Tensor, keep: Tensor | None = None
    ) -> TeacherOutput:
        """A teacher-forced pass.

        Args:
            student: whose trunk and head a shared teacher uses.
            trace: the student's pass over the same batch.
            labels: (B,), as given to the student.
            inputs: (B, L - pn_1^2, Z), as given to the student.
            alias: alias codebook vectors of all scales, (B, L, Z_a).
            keep: (depth, B, 2), as given to the student: a sample skips in both what it skips in one.
        """
        if self.network is None:
            network, condition, x = student, trace.condition, trace.hidden[self.first]
            if self.detached:
                condition, x = Condition(*(part.detach() for part in condition)), x.detach()
        else:
            network = self.network
            condition = network.condition(labels)
            x = network.run(network.embed(condition, inputs), condition, keep)[-1]
        n = self.alias_length
        alias = self.alias_embed(alias[:, :n]) + self.alias_positions[:, :n] + self.alias_levels(self.level_ids[:n])
        hidden = []
        for i, block in enumerate(self.blocks, start=self.first):
            kept = None if keep is None else keep[i]
            x = block(
                x,
                condition.for_blocks,
                alias,
                self.layout.slices,
                self.reads,
                kept,
                recompute=network.recompute,
            )
            hidden.append(x)
        readout = network.readout(x, condition)
        if self.detached:
            readout = Readout(x, *(part.detach() for part in readout[1:]))
        return TeacherOutput(hidden, readout)


def _reads(slices: Sequence[slice], scales: int, alias_length: int, context: AliasContext) -> list[Reading]:
    """What the tokens of the last `scales` scales see, up to the last alias token that there is; a scale without any
    reads nothing."""
    ahead = {"own_scale": 0, "causal": 0, "next": 1, "all": len(slices)}[context]
    reads = []
    for scale in range(len(slices) - scales, len(slices)):
        first = slices[scale].start if context == "own_scale" else 0
        last = min(slices[min(scale + ahead, len(slices) - 1)].stop, alias_length)
        if first < last:
            reads.append(Reading(slices[scale], slice(first, last)))
    return reads
