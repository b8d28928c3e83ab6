"""Wrong tokens to learn from: what a sampler gets wrong at one scale, the next scales are taught to put right.

Trained on true tokens alone, a transformer never sees a mistake, and when it samples it reads its own (exposure bias).
Here some tokens of every scale become others, and later scales get the tokens that a quantiser would choose after them,
as in the self-correction of Infinity (arXiv 2412.04431), which flips bits of a code.

Legend: B batch, S scales, L tokens of all scales, Z latent channels, pn_s side of scale s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from fvar_lightning.precision import no_autocast
from fvar_lightning.tokenizer.quantizer import MultiScaleQuantizer

NEIGHBOURS = 32
"""A wrong token is one of so many that come next to the right one."""


class Corrupted(NamedTuple):
    """What a transformer reads and predicts when some tokens have gone wrong."""

    inputs: Tensor
    """(B, L - pn_1^2, Z), see `MultiScaleQuantizer.var_inputs`."""
    targets: list[Tensor]
    """S tensors (B, pn_s^2) int64."""


@torch.no_grad()
def corrupted(
    quantizer: MultiScaleQuantizer, indices: Sequence[Tensor], shares: Tensor, generator: torch.Generator
) -> Corrupted:
    """Replace tokens at random, and requantise what follows.

    The target of a scale is the code nearest to its own code plus what the wrong tokens before it took away: that needs
    no features, and is the very token where nothing has gone wrong.

    Args:
        indices: token maps, S tensors (B, pn_s^2).
        shares: (B,) probabilities, of every image, that a token is replaced by one of its neighbours.
        generator: draws which, and by what.
    """
    codebook, device = quantizer.codebook, shares.device
    count = min(NEIGHBOURS, codebook.vocab_size - 1)
    side = quantizer.patch_nums[-1]
    with no_autocast(shares):
        right = wrong = quantizer.code_map(indices[0]).new_zeros(len(shares), codebook.channels, side, side)
        inputs, targets = [], []
        for s, tokens in enumerate(indices):
            missing = rearrange(quantizer.down(right - wrong, s), "b c h w -> b (h w) c")
            ranked = codebook.ranked((codebook(tokens).to(missing.dtype) + missing).flatten(0, 1), count + 1)
            ranked = ranked.view(*tokens.shape, -1)
            targets.append(torch.where(missing.any(-1), ranked[..., 0], tokens))
            if s == len(indices) - 1:
                break
            drawn = 1 + torch.randint(count, tokens.shape, device=device, generator=generator)
            other = ranked.gather(-1, drawn[..., None])[..., 0]
            replaced = torch.rand(tokens.shape, device=device, generator=generator) < shares[:, None]
            right = quantizer.add(right, quantizer.code_map(tokens), s)
            wrong = quantizer.add(wrong, quantizer.code_map(torch.where(replaced, other, targets[-1])), s)
            inputs.append(quantizer.next_input(wrong, s))
    nothing = right.new_zeros(len(shares), 0, codebook.channels)
    return Corrupted(torch.cat([nothing, *inputs], dim=1), targets)
