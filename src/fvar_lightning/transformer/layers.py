"""The transformer's parts: attention with an explicit KV cache, feed-forward, and the AdaLN block. VAR's names.

Legend: B batch, L tokens, C width, H heads, D = C / H.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvar_lightning.activations import recomputed


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of tokens (B, L, C) with the scale (less 1) and shift (B, 1, C) of their sample."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (scale + 1) + shift


class KVCache:
    """Keys and values of the tokens generated so far, one pair per block, allocated once for the whole sequence.

    Args:
        depth: number of blocks.
        length: tokens of all scales.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.length = length
        self.filled = [0] * depth
        self._storage: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, l, D) keys and values of a block and return all of it so far, (B, H, filled, D)."""
        pair = self._storage[block]
        if pair is None:
            batch, heads, _, head_dim = k.shape
            pair = (k.new_empty(batch, heads, self.length, head_dim), v.new_empty(batch, heads, self.length, head_dim))
            self._storage[block] = pair
        start, stop = self.filled[block], self.filled[block] + k.shape[2]
        for stored, new in zip(pair, (k, v), strict=True):
            stored[:, :, start:stop] = new
        self.filled[block] = stop
        return pair[0][:, :, :stop], pair[1][:, :, :stop]

    def keep(self, batch: int) -> None:
        """Only the first `batch` samples; the memory of the others is freed."""
        for block, pair in enumerate(self._storage):
            if pair is not None:
                self._storage[block] = pair[0][:batch].clone(), pair[1][:batch].clone()


def normalised(q: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, L, D) of cosine attention, from temperatures (1, H, 1, 1) too; float32 under autocast."""
    return F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)


class _UpToEveryScale(torch.autograd.Function):
    """(B, H, L, D) -> its first tokens, up to the end of every scale, as views.

    Slices would each have a gradient of the whole length, filled with zeros. These add up in one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stops: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.stops = stops
        return tuple(x[:, :, :stop] for stop in stops)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[-1].clone()
        for stop, gradient in zip(ctx.stops[:-1], gradients[:-1], strict=True):
            whole[:, :, :stop] += gradient
        return whole, None


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, slices: Sequence[slice], scale: float) -> list[Tensor]:
    """Every scale reads itself and the scales before it: (B, H, L, D) each -> (B, H, l, D) of every scale.

    One call per scale without a mask is exact, lets fused kernels run, and needs no (L, L) tensor.
    """
    queries = q.split([s.stop - s.start for s in slices], dim=2)
    keys, values = (_UpToEveryScale.apply(x, tuple(s.stop for s in slices)) for x in (k, v))
    return [F.scaled_dot_product_attention(*read, scale=scale) for read in zip(queries, keys, values, strict=True)]


def merged(heads: Sequence[Tensor]) -> Tensor:
    """What heads read for every scale, (B, H, l, D) each -> tokens (B, L, C)."""
    return torch.cat([rearrange(x, "b h l d -> b l (h d)") for x in heads], dim=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention; with `l2_norm`, cosine attention with a learned temperature per head."""

    MAX_SCALE = math.log(100)

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(width // heads)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    zero_k_bias: Tensor

    def forward(self, x: Tensor, slices: Sequence[slice]) -> Tensor:
        """Tokens of all scales, (B, L, C) -> (B, L, C); every scale reads itself and the scales before it."""
        q, k, v = self._qkv(x)
        return recomputed(self._projected, *block_causal_attention(q, k, v, slices, self.scale))

    def step(self, x: Tensor, cache: KVCache, block: int) -> Tensor:
        """Tokens of the next scale, (B, l, C) -> (B, l, C); they read everything block `block` has cached."""
        q, k, v = self._qkv(x)
        k, v = cache.append(block, k, v)
        return self._projected(F.scaled_dot_product_attention(q, k, v, scale=self.scale))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        if self.l2_norm:
            q, k = recomputed(normalised, q, k, self.scale_mul_1H11.clamp_max(self.MAX_SCALE).exp())
        return q.to(v.dtype), k.to(v.dtype), v

    def _projected(self, *heads: Tensor) -> Tensor:
        return self.proj(merged(heads))


class FFN(nn.Module):
    """(..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._contract, self.fc1(x))

    def _contract(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(x, approximate="tanh"))


class AdaLNBlock(nn.Module):
    """Pre-norm transformer block whose norms are modulated by the class (DiT).

    Args:
        width: C.
        heads: H.
        hidden: width of the feed-forward layer.
        shared_aln: add a learned offset to one modulation shared by all blocks instead of computing an own one.
        l2_norm: cosine attention.
        drop_path_rate: stochastic depth: how often a sample skips a branch in training (see `VAR.keep_masks`).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, shared_aln: bool, l2_norm: bool, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, l2_norm)
        self.ffn = FFN(width, hidden)
        self.drop_path_rate = drop_path_rate
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5) if shared_aln else None
        self.ada_lin = None if shared_aln else nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    @torch.no_grad()
    def close_branches(self, depth: int, gain: float) -> None:
        """Scale freshly drawn weights so that the branches of `depth` blocks start almost closed (see `VAR`)."""
        self.attn.proj.weight.div_(math.sqrt(2 * depth))
        self.ffn.fc2.weight.div_(math.sqrt(2 * depth))
        factors = torch.tensor([gain] * 2 + [0.5] * 4)
        if self.ada_gss is not None:
            self.ada_gss.mul_(factors[:, None].to(self.ada_gss))
        elif self.ada_lin is not None:
            weight = cast(nn.Linear, self.ada_lin[1]).weight
            weight.mul_(factors.to(weight).repeat_interleave(weight.shape[1])[:, None])

    def modulation(self, condition: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, 6, C): gains, scales and shifts of both branches.

        Args:
            condition: the class embedding (B, C), or with shared AdaLN the shared modulation (B, 6, C).
            keep: stochastic depth, (B, 2) factors on the branches' gains; ``None`` keeps all.
        """
        if self.ada_gss is not None:
            modulation = self.ada_gss[0] + condition
        else:
            assert self.ada_lin is not None
            modulation = rearrange(self.ada_lin(condition), "b (six c) -> b six c", six=6)
        if keep is None:
            return modulation
        gains, others = modulation.split([2, 4], dim=1)
        return torch.cat((gains * keep[..., None].to(gains.dtype), others), dim=1)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        slices: Sequence[slice],
        keep: Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """A teacher-forced pass: (B, L, C) -> (B, L, C).

        Args:
            x: tokens of all scales.
            condition: as `modulation` takes it.
            slices: where every scale's tokens lie.
            keep: as `modulation` takes it.
            recompute: keep only the arguments for the backward pass.
        """
        if recompute:
            return recomputed(self.forward, x, condition, slices, keep)
        modulation = self.modulation(condition, keep)
        x = self.attend(x, modulation, lambda h: self.attn(h, slices))
        return self.feed(x, modulation)

    def step(self, x: Tensor, modulation: Tensor, cache: KVCache, index: int) -> Tensor:
        """The tokens (B, l, C) of the next scale, reading all that block `index` has cached."""
        x = self.attend(x, modulation, lambda h: self.attn.step(h, cache, index))
        return self.feed(x, modulation)

    def attend(self, x: Tensor, modulation: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The attention branch."""
        gain, _, scale, _, shift, _ = modulation[:, :, None].unbind(1)
        return x + attention(recomputed(modulated_norm, x, scale, shift)) * gain

    def feed(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The feed-forward branch."""
        _, gain, _, scale, _, shift = modulation[:, :, None].unbind(1)
        return x + self.ffn(recomputed(modulated_norm, x, scale, shift)) * gain


class AdaLNBeforeHead(nn.Module):
    """The modulated norm before the classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, (B, 1, C) each, from (B, C)."""
        scale, shift = rearrange(self.ada_lin(condition), "b (two c) -> two b 1 c", two=2)
        return scale, shift

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, L, C), (B, C) -> (B, L, C)."""
        return modulated_norm(x, *self.modulation(condition))
