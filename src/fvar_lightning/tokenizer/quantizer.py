"""MultiScaleQuantizer: features <-> token maps, coarse to fine (VAR section 3.2; three targets, see `VQVAE`).

Legend: B batch, S scales, C latent channels, h x w the last scale's map (h = w = pn_S), pn_s side of scale s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvar_lightning.precision import no_autocast
from fvar_lightning.tokenizer.codebook import Codebook, exact


class Quantized(NamedTuple):
    """What quantising a batch gives."""

    stages: list[Tensor]
    """f_hat after every scale, S tensors (B, C, h, w); gradients pass straight through to the features."""
    indices: list[Tensor]
    """Token maps, S tensors (B, pn_s^2) int64; empty while the codebook warms up."""
    loss: Tensor
    """Codebook and commitment loss, a scalar."""


class Phi(nn.Conv2d):
    """Half identity, half a 3 x 3 convolution: repairs what the up-sampling of a token map blurs.

    It begins as the identity, so that token maps add up from the first step.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        assert self.bias is not None
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        with no_autocast(x):
            return 0.5 * x + 0.5 * F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)


class MultiScaleQuantizer(nn.Module):
    """Quantises the features z_s of every scale as residuals of one growing map f_hat.

    At scale s it quantises ``z_s - down_s(f_hat)`` and adds ``phi_s(up(code))``. With z_s the area average of one
    feature map this is VAR's quantiser; with z_s the features of view s it is next-focus quantisation. It computes in
    float32 at least, under autocast and with weights of half precision too (cuDNN rounds float32 convolutions to TF32
    unless ``torch.backends.cudnn.allow_tf32`` is off).

    Args:
        patch_nums: side of every token map.
        codebook: the codes, shared by all scales.
        num_phi: phi convolutions, shared evenly among the scales; ``None``: official VAR's 4, or S if that is less.
            Of more than S, as official files may have, some serve no scale.
        commitment: weight of the commitment loss.
        sharp_commitment: weight of one more: the last scale's features commit to f_hat after every earlier scale too,
            as in VAR, where all scales have the same features.

    Raises:
        ValueError: if there is no convolution.
    """

    def __init__(
        self,
        patch_nums: Sequence[int],
        codebook: Codebook,
        *,
        num_phi: int | None = None,
        commitment: float = 0.25,
        sharp_commitment: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        num_phi = min(4, len(self.patch_nums)) if num_phi is None else num_phi
        if num_phi < 1:
            raise ValueError(f"num_phi must be at least 1, got {num_phi}")
        self.codebook = codebook
        self.commitment, self.sharp_commitment = commitment, sharp_commitment
        channels = codebook.embedding.embedding_dim
        self.phi = nn.ModuleList(Phi(channels) for _ in range(num_phi))

    def phi_of(self, scale: int) -> nn.Module:
        """The convolution of a scale: the one whose tick lies nearest to s / (S - 1), as in official VAR."""
        k = len(self.phi)
        margin = 1 / 3 / k if k == 4 else 1 / 2 / k
        # NumPy's own linspace and argmin: at ten scales and four convolutions scale 2 ties but for rounding
        ticks = np.linspace(margin, 1 - margin, k)
        return self.phi[int(np.argmin(np.abs(ticks - scale / max(len(self.patch_nums) - 1, 1))))]

    def up(self, x: Tensor) -> Tensor:
        """(B, C, pn, pn) -> (B, C, h, w), bicubic."""
        x, size = exact(x), self.patch_nums[-1]
        return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bicubic")

    def down(self, f: Tensor, scale: int) -> Tensor:
        """(B, C, h, w) -> (B, C, pn_s, pn_s), area average."""
        return F.interpolate(exact(f), size=(self.patch_nums[scale],) * 2, mode="area")

    def add(self, f_hat: Tensor, code: Tensor, scale: int) -> Tensor:
        """f_hat with the code map (B, C, pn_s, pn_s) of a scale added."""
        return f_hat + self.phi_of(scale)(self.up(code))

    def code_map(self, indices: Tensor) -> Tensor:
        """(B, pn^2) indices -> (B, C, pn, pn) codes."""
        return rearrange(exact(self.codebook(indices)), "b (h w) c -> b c h w", h=round(indices.shape[1] ** 0.5))

    def forward(self, features: Sequence[Tensor], references: Sequence[Tensor] | None = None) -> Quantized:
        """Quantise; in training mode the codebook collects what its `step` needs.

        Args:
            features: z_s, S tensors (B, C, pn_s, pn_s).
            references: what f_hat is drawn to after every scale, at size pn_s or h; `features` where left out.
        """
        with no_autocast(features[0]):
            features = [exact(z) for z in features]
            references = features if references is None else [exact(z) for z in references]
            return (self._warm_up if self.codebook.warming_up else self._quantise)(features, references)

    def _quantise(self, features: Sequence[Tensor], references: Sequence[Tensor]) -> Quantized:
        f_hat = torch.zeros_like(features[-1])
        stages: list[Tensor] = []
        pool: list[Tensor] = []
        chosen: list[Tensor] = []
        loss = f_hat.new_zeros(())
        for s, (z, reference) in enumerate(zip(features, references, strict=True)):
            residual = rearrange(z.detach() - self.down(f_hat.detach(), s), "b c h w -> (b h w) c")
            indices = self.codebook.nearest(residual)
            pool.append(residual)
            chosen.append(indices)
            f_hat = self.add(f_hat, self.code_map(indices.view(len(z), -1)), s)
            at_reference = self._like(f_hat, reference, s)
            loss = loss + F.mse_loss(at_reference, reference.detach())
            loss = loss + self.commitment * F.mse_loss(reference, at_reference.detach())
            if self.sharp_commitment and s < len(features) - 1:
                loss = loss + self.sharp_commitment * F.mse_loss(features[-1], f_hat.detach())
            through = self.up(reference)
            stages.append(f_hat.detach() + through - through.detach())
        if self.training:
            self.codebook.collect(pool, chosen)
        maps = [i.view(len(z), -1) for i, z in zip(chosen, features, strict=True)]
        return Quantized(stages, maps, loss / len(features))

    @torch.no_grad()
    def encode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Token maps of the features z_s: S tensors (B, pn_s^2) int64."""
        with no_autocast(features[0]):
            features = [exact(z) for z in features]
            f_hat = torch.zeros_like(features[-1])
            maps = []
            for s, z in enumerate(features):
                residual = rearrange(z - self.down(f_hat, s), "b c h w -> (b h w) c")
                indices = self.codebook.nearest(residual).view(len(z), -1)
                f_hat = self.add(f_hat, self.code_map(indices), s)
                maps.append(indices)
            return maps

    def _warm_up(self, features: Sequence[Tensor], references: Sequence[Tensor]) -> Quantized:
        """Everything passes unquantised, and phi learns to add up exact residuals."""
        residuals, f_hats = self._residuals([z.detach() for z in features])
        if self.codebook.needs_init:
            self.codebook.collect(residuals)
        losses = [
            F.mse_loss(self._like(f, r, s), r.detach()) for s, (f, r) in enumerate(zip(f_hats, references, strict=True))
        ]
        return Quantized([self.up(r) for r in references], [], torch.stack(losses).mean())

    def _residuals(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What each scale would quantise, (N_s, C), and f_hat after it, if no code were in error."""
        f_hat = torch.zeros_like(features[-1])
        residuals, f_hats = [], []
        for s, z in enumerate(features):
            residual = z - self.down(f_hat, s)
            f_hat = self.add(f_hat, residual, s)
            residuals.append(rearrange(residual.detach(), "b c h w -> (b h w) c"))
            f_hats.append(f_hat)
        return residuals, f_hats

    def _like(self, f_hat: Tensor, reference: Tensor, scale: int) -> Tensor:
        """f_hat at the size of the reference: its own, or the scale's."""
        return f_hat if reference.shape == f_hat.shape else self.down(f_hat, scale)

    def stages(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """f_hat after every scale from token maps: S tensors (B, pn_s^2) -> S tensors (B, C, h, w)."""
        shape = (len(indices[0]), self.codebook.channels, self.patch_nums[-1], self.patch_nums[-1])
        f_hat = exact(self.codebook.embedding.weight.new_zeros(shape))
        stages = []
        for s, tokens in enumerate(indices):
            f_hat = self.add(f_hat, self.code_map(tokens), s)
            stages.append(f_hat)
        return stages

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        """What VAR reads to predict the scale after `scale`: (B, C, h, w) -> (B, pn_{s+1}^2, C)."""
        return rearrange(self.down(f_hat, scale + 1), "b c h w -> b (h w) c")

    def var_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """Teacher-forcing input of VAR: S token maps -> (B, L - pn_1^2, C), float32 at least."""
        if len(self.patch_nums) == 1:
            return exact(self.codebook(indices[0][:, :0]))
        stages = self.stages(indices[:-1])
        return torch.cat([self.next_input(f_hat, s) for s, f_hat in enumerate(stages)], dim=1)
