"""AliasTokenizer: Q_A, which tokenises the alias residual A_s = D_s - L_s of every scale by itself.

Legend: B batch, S scales, pn_s side of token map s, p patch size, Z latent channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.autoencoder import Decoder, Encoder
from fvar_lightning.tokenizer.codebook import Codebook, exact
from fvar_lightning.tokenizer.vqvae import check_patch_size


class AliasPass(NamedTuple):
    """A training pass over n scales."""

    reconstructions: list[Tensor]
    """Decoded residuals at unit variance, n tensors (B, 3, pn_s p, pn_s p)."""
    targets: list[Tensor]
    """What they should be."""
    indices: list[Tensor]
    """n tensors (B, pn_s^2) int64; empty while the codebook warms up."""
    loss: Tensor
    """Commitment loss, a scalar."""


class AliasTokenizer(nn.Module):
    """A small VQ autoencoder over signed, zero-mean residuals, each scale divided by its running standard deviation.

    The residuals of two scales are different bands of the image, so no scale is quantised as a correction of another.

    Args:
        schedule: token layout.
        vocab_size: codes (paper: 512).
        z_channels, ch, ch_mult, num_res_blocks, norm_groups: of the autoencoder, as in `VQVAE`.
        momentum: weight of one batch in the running standard deviation.
        commitment: weight of the commitment loss.
        codebook: further arguments of `Codebook`.
    """

    def __init__(
        self,
        schedule: FocusSchedule,
        *,
        vocab_size: int = 512,
        z_channels: int = 32,
        ch: int = 64,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 1,
        norm_groups: int = 32,
        momentum: float = 0.01,
        commitment: float = 0.25,
        **codebook: Any,
    ) -> None:
        super().__init__()
        check_patch_size(schedule, ch_mult)
        self.schedule = schedule
        self.z_channels = z_channels
        self.norm_groups = norm_groups
        self.momentum, self.commitment = momentum, commitment
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels, norm_groups)
        self.codebook = Codebook(vocab_size, z_channels, **codebook)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels, norm_groups)
        self.register_buffer("variance", torch.zeros(schedule.num_scales))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    variance: Tensor
    batches: Tensor

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.codebook.vocab_size

    def codes(self, indices: Tensor) -> Tensor:
        """Codebook vectors: (...) indices -> (..., Z)."""
        return self.codebook(indices)

    def std(self, scale: int) -> Tensor:
        """Running standard deviation of a scale's residual; 1 where there has been none."""
        variance = self.variance[scale] / (1 - (1 - self.momentum) ** self.batches).clamp_min(self.momentum)
        return torch.where(variance > 0, variance.sqrt(), 1.0)

    def forward(self, residuals: Sequence[Tensor]) -> AliasPass:
        """A training pass.

        Args:
            residuals: A_s of the first n scales (the last scale's is zero by construction), (B, 3, pn_s p, pn_s p).
        """
        if self.training:
            self._track(residuals)
        targets = [a / self.std(s) for s, a in enumerate(residuals)]
        features = [exact(self.encoder(t)) for t in targets]
        vectors = [rearrange(z, "b c h w -> (b h w) c") for z in features]
        loss = vectors[0].new_zeros(())
        indices: list[Tensor] = []
        quantised = features
        if not self.codebook.warming_up:
            if self.codebook.needs_init:
                self.codebook.initialise([z.detach() for z in vectors])
            chosen = [self.codebook.nearest(z.detach()) for z in vectors]
            if self.training:
                self.codebook.update([z.detach() for z in vectors], chosen)
            indices = [i.view(len(z), -1) for i, z in zip(chosen, features, strict=True)]
            codes = [self._code_map(i) for i in indices]
            loss = sum((F.mse_loss(z, c) for z, c in zip(features, codes, strict=True)), loss)
            loss = loss * self.commitment / len(features)
            quantised = [z + (c - z).detach() for z, c in zip(features, codes, strict=True)]
        if self.training:
            self.codebook.step()
        return AliasPass([self.decoder(q) for q in quantised], targets, indices, loss)

    @torch.no_grad()
    def _track(self, residuals: Sequence[Tensor]) -> None:
        variance = torch.stack([exact(a).square().mean() for a in residuals])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(variance)
            variance /= distributed.get_world_size()
        self.variance[: len(variance)].lerp_(variance, self.momentum)
        self.batches += 1

    def _code_map(self, indices: Tensor) -> Tensor:
        return rearrange(self.codebook(indices), "b (h w) c -> b c h w", h=round(indices.shape[1] ** 0.5))

    @torch.no_grad()
    def encode(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """A_s of S scales, (B, 3, pn_s p, pn_s p) each -> S token maps (B, pn_s^2) int64."""
        indices = []
        for s, a in enumerate(residuals):
            z = rearrange(exact(self.encoder(a / self.std(s))), "b c h w -> b (h w) c")
            indices.append(self.codebook.nearest(z.flatten(0, 1)).view(z.shape[:2]))
        return indices

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """S token maps (B, pn_s^2) -> the alias residuals, S tensors (B, 3, pn_s p, pn_s p)."""
        return [self.decoder(self._code_map(i)) * self.std(s) for s, i in enumerate(indices)]
