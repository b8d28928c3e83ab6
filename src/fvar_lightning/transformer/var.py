"""VAR: the student, a vanilla visual autoregressive transformer, and the only network that is deployed.

Legend: B batch, S scales, L tokens of all scales, l tokens of one scale, C width, Z latent channels, V codebook.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvar_lightning.schedule import VAR_PATCH_NUMS, FocusSchedule
from fvar_lightning.transformer.layers import AdaLNBeforeHead, AdaLNBlock, KVCache, modulated_norm


class Condition(NamedTuple):
    """What a label contributes."""

    embedding: Tensor
    """(B, C)."""
    for_blocks: Tensor
    """What the blocks' AdaLN reads: the embedding, or with shared AdaLN the shared modulation (B, 6, C)."""


class Trace(NamedTuple):
    """A teacher-forced pass up to the logits."""

    hidden: list[Tensor]
    """depth + 1 tensors (B, L, C): the embedded input, then the output of every block."""
    condition: Condition


class Readout(NamedTuple):
    """Hidden states and all that makes logits of them, so that they can be made piece by piece."""

    hidden: Tensor
    """(B, l, C), output of the last block."""
    scale: Tensor
    """(B, 1, C), of the norm before the classifier."""
    shift: Tensor
    """(B, 1, C)."""
    weight: Tensor
    """(V, C), the classifier's."""
    bias: Tensor
    """(V,)."""

    def logits(self) -> Tensor:
        """(B, l, V)."""
        return F.linear(modulated_norm(self.hidden, self.scale, self.shift), self.weight, self.bias)

    def split(self, size: int) -> list["Readout"]:
        """Pieces of `size` tokens a sample."""
        return [self._replace(hidden=piece) for piece in self.hidden.split(size, dim=1)]


class VAR(nn.Module):
    """Next-scale transformer with AdaLN class conditioning (VAR section 3.3), parameter for parameter official VAR.

    Args:
        patch_nums: side of every token map.
        vocab_size: V.
        z_channels: Z of the tokenizer.
        num_classes: labels 0..num_classes-1; num_classes itself is the null class.
        depth: number of blocks.
        width: C; ``None`` is 64 * depth.
        heads: attention heads; ``None`` is width / 64.
        mlp_ratio: feed-forward width over C.
        drop_path_rate: stochastic depth of the last block, rising linearly; ``None`` is 0.1 * depth / 24.
        shared_aln: one AdaLN modulation for all blocks (d36).
        attn_l2_norm: cosine attention (all official weights).
        initial_gain: how far the residual branches are open at the start; official runs take 1e-3 at depths 16 and 20,
            1e-4 at 24, 1e-5 at 30 and 5e-6 at 36.
        recompute: keep only the inputs of every block for the backward pass, which runs the blocks once more, one at a
            time: a third more work for a fraction of the memory. It can be switched at any time.

    Raises:
        ValueError: if width and heads do not divide, a size is not positive, drop_path_rate is not in [0, 1), or
            initial_gain is negative.
    """

    def __init__(
        self,
        patch_nums: Sequence[int] = VAR_PATCH_NUMS,
        *,
        vocab_size: int = 4096,
        z_channels: int = 32,
        num_classes: int = 1000,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float | None = None,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        initial_gain: float = 1e-5,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = max(width // 64, 1) if heads is None else heads
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if min(width, heads) < 1 or width % heads:
            raise ValueError(f"width must be a positive multiple of heads, got width {width} and heads {heads}")
        drop_path_rate = 0.1 * depth / 24 if drop_path_rate is None else drop_path_rate
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        if initial_gain < 0:
            raise ValueError(f"initial_gain must not be negative, got {initial_gain}")
        # a VAR knows no focus, only the token layout
        self.layout = FocusSchedule(tuple(patch_nums), focus_states=1)
        self.vocab_size, self.z_channels, self.num_classes = vocab_size, z_channels, num_classes
        self.depth, self.width, self.heads = depth, width, heads
        self.shared_aln, self.attn_l2_norm = shared_aln, attn_l2_norm
        self.initial_gain, self.recompute = initial_gain, recompute

        self.word_embed = nn.Linear(z_channels, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.layout.first_length, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.layout.length, width))
        self.lvl_embed = nn.Embedding(self.layout.num_scales, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                width,
                heads,
                round(width * mlp_ratio),
                shared_aln=shared_aln,
                l2_norm=attn_l2_norm,
                drop_path_rate=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.head_nm = AdaLNBeforeHead(width)
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("level_ids", self.layout.level_ids(), persistent=False)
        self.init_weights()

    level_ids: Tensor

    @property
    def _blocks(self) -> list[AdaLNBlock]:
        return cast(list[AdaLNBlock], list(self.blocks))

    @torch.no_grad()
    def init_weights(self) -> None:
        """VAR's initialisation: truncated normals of variance 1 / (3 C), residual branches that start almost closed.

        | parameter | factor |
        |---|---|
        | branch outputs (proj, fc2) | 1 / sqrt(2 depth) |
        | AdaLN gains | `initial_gain` |
        | AdaLN scales and shifts | 0.5 |
        | classifier | 0.02 |
        | biases | 0 |
        """
        std = math.sqrt(1 / (3 * self.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=std)
        for block in self._blocks:
            block.close_branches(self.depth, self.initial_gain)
        cast(nn.Linear, self.head_nm.ada_lin[1]).weight.mul_(0.5)
        self.head.weight *= 0.02

    def condition(self, labels: Tensor) -> Condition:
        """(B,) labels -> what they contribute."""
        embedding = self.class_emb(labels)
        if not self.shared_aln:
            return Condition(embedding, embedding)
        return Condition(embedding, rearrange(self.shared_ada_lin(embedding), "b (six c) -> b six c", six=6))

    def positions(self) -> Tensor:
        """Level plus position embedding of every token, (1, L, C)."""
        return self.lvl_embed(self.level_ids) + self.pos_1LC

    def start(self, condition: Condition) -> Tensor:
        """Tokens of the first scale, (B, l, C), without level and position."""
        return condition.embedding[:, None] + self.pos_start

    def embed(self, condition: Condition, inputs: Tensor) -> Tensor:
        """Input tokens of all scales, (B, L, C), from (B, L - pn_1^2, Z) features."""
        return (
            torch.cat((self.start(condition), self.word_embed(inputs.to(self.word_embed.weight.dtype))), dim=1)
            + self.positions()
        )

    def readout(self, hidden: Tensor, condition: Condition) -> Readout:
        """What makes logits of the output of the last block, (B, l, C)."""
        scale, shift = self.head_nm.modulation(condition.embedding)
        return Readout(hidden, scale, shift, self.head.weight, self.head.bias)

    def logits(self, hidden: Tensor, condition: Condition) -> Tensor:
        """(B, l, C) output of the last block -> (B, l, V)."""
        return self.readout(hidden, condition).logits()

    def keep_masks(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Stochastic depth of one training step, drawn outside the blocks: (depth, B, 2).

        What every block's two branches are multiplied by for each sample: 0 where the sample skips the branch, else
        1 / (1 - drop rate of the block), which keeps the mean.

        Args:
            batch: B.
            generator: on the network's device.
        """
        device = self.pos_start.device
        # filled in on the device: a tensor of the host's numbers would have to be waited for
        kept = torch.stack([torch.full((1, 1), 1 - block.drop_path_rate, device=device) for block in self._blocks])
        return (torch.rand(self.depth, batch, 2, device=device, generator=generator) < kept) / kept

    def run(self, tokens: Tensor, condition: Condition, keep: Tensor | None = None) -> list[Tensor]:
        """Tokens of all scales through the blocks: depth + 1 tensors (B, L, C), the tokens first."""
        hidden = [tokens]
        for i, block in enumerate(self.blocks):
            kept = None if keep is None else keep[i]
            x = block(hidden[-1], condition.for_blocks, self.layout.slices, kept, recompute=self.recompute)
            hidden.append(x)
        return hidden

    def trace(self, labels: Tensor, inputs: Tensor, keep: Tensor | None = None) -> Trace:
        """`forward` up to the logits, with everything a teacher reads from the pass."""
        condition = self.condition(labels)
        return Trace(self.run(self.embed(condition, inputs), condition, keep), condition)

    def forward(self, labels: Tensor, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            labels: (B,) int64 in 0..num_classes.
            inputs: (B, L - pn_1^2, Z), from `VQVAE.var_inputs`.
            keep: stochastic depth in training, (depth, B, 2) from `keep_masks`; ``None`` skips no branch.

        Returns:
            (B, L, V).
        """
        trace = self.trace(labels, inputs, keep)
        return self.logits(trace.hidden[-1], trace.condition)

    def modulations(self, condition: Condition) -> list[Tensor]:
        """AdaLN modulations of every block, (B, 6, C) each: computed once per sample, read at every scale."""
        return [block.modulation(condition.for_blocks) for block in self._blocks]

    def step(self, tokens: Tensor, modulations: Sequence[Tensor], cache: KVCache) -> Tensor:
        """One scale of generation: embedded tokens (B, l, C) -> output of the last block (B, l, C)."""
        for i, (block, modulation) in enumerate(zip(self._blocks, modulations, strict=True)):
            tokens = block.step(tokens, modulation, cache, i)
        return tokens
