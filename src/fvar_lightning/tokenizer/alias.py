"""AliasTokenizer: Q_A, which tokenises the alias residual A_s = D_s - L_s of every scale by itself.

Legend: B batch, S scales, pn_s side of token map s, p patch size, W width, Z latent channels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from fvar_lightning.checks import check_positive
from fvar_lightning.optics.psf import check_psf
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.autoencoder import ResnetBlock
from fvar_lightning.tokenizer.codebook import Codebook, exact
from fvar_lightning.tokenizer.reconstruction import Reconstruction


class PatchEncoder(nn.Module):
    """(B, 3, h p, w p) -> (B, Z, h, w): a linear map of every patch, then residual blocks over the patches."""

    def __init__(self, patch_size: int, width: int, num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.blocks = nn.Sequential(*(ResnetBlock(width, width, groups=1) for _ in range(num_res_blocks)))
        self.conv_out = nn.Conv2d(width, z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.blocks(self.patch(x)))


class PatchDecoder(nn.Module):
    """(B, Z, h, w) -> (B, 3, h p, w p), the mirror image of `PatchEncoder`."""

    def __init__(self, patch_size: int, width: int, num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, width, 1)
        self.blocks = nn.Sequential(*(ResnetBlock(width, width, groups=1) for _ in range(num_res_blocks)))
        self.patch = nn.ConvTranspose2d(width, 3, patch_size, stride=patch_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.patch(self.blocks(self.conv_in(z)))


class AliasTokenizer(nn.Module):
    """A small VQ autoencoder over signed, zero-mean residuals, each scale divided by its running standard deviation.

    The residuals of two scales are different bands of the image, so no scale is quantised as a correction of another.
    Within a band they are nearly white and strong in few places. Hence patches, not a pyramid of convolutions (which
    learns nothing of them in the time that this takes); and look-up by angle, without which most codes would serve the
    few strong patches. One of 512 codes can explain little of a patch's 3 p^2 values: of white noise
    20 log10(512) / (3 p^2) dB, that is 0.28 dB at p = 8; of photographs about three times that.

    Args:
        schedule: token layout.
        psf: point-spread function whose residuals these are, see `Refocus`.
        vocab_size: codes (paper: 512).
        z_channels: Z.
        ch: width of the residual blocks.
        num_res_blocks: in the encoder and in the decoder.
        momentum: weight of one batch in the running standard deviation.
        commitment: weight of the commitment loss.
        codebook: further arguments of `Codebook`.
    """

    def __init__(
        self,
        schedule: FocusSchedule,
        *,
        psf: str = "disk",
        vocab_size: int = 512,
        z_channels: int = 64,
        ch: int = 128,
        num_res_blocks: int = 1,
        momentum: float = 0.01,
        commitment: float = 0.25,
        **codebook: Any,
    ) -> None:
        super().__init__()
        check_positive({"ch": ch, "z_channels": z_channels, "num_res_blocks": num_res_blocks})
        self.schedule, self.psf = schedule, check_psf(psf)
        self.z_channels = z_channels
        self.momentum, self.commitment = momentum, commitment
        sizes = schedule.patch_size, ch, num_res_blocks, z_channels
        self.encoder = PatchEncoder(*sizes)
        self.codebook = Codebook(vocab_size, z_channels, cosine=True, **codebook)
        self.decoder = PatchDecoder(*sizes)
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

    def forward(self, residuals: Sequence[Tensor]) -> Reconstruction:
        """A training pass: decoded residuals at unit variance, beside what they should be. The codebook's `step` is to
        follow the optimiser's.

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
        if self.codebook.needs_init:
            self.codebook.collect([z.detach() for z in vectors])
        if not self.codebook.warming_up:
            chosen = [self.codebook.nearest(z.detach()) for z in vectors]
            if self.training:
                self.codebook.collect([z.detach() for z in vectors], chosen)
            indices = [i.view(len(z), -1) for i, z in zip(chosen, features, strict=True)]
            codes = [self._code_map(i) for i in indices]
            loss = sum((F.mse_loss(z, c) for z, c in zip(features, codes, strict=True)), loss)
            loss = loss * self.commitment / len(features)
            quantised = [z + (c - z).detach() for z, c in zip(features, codes, strict=True)]
        return Reconstruction([self.decoder(q) for q in quantised], targets, indices, loss)

    @torch.no_grad()
    def _track(self, residuals: Sequence[Tensor]) -> None:
        variance = torch.stack([exact(a).square().mean() for a in residuals])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(variance)
            variance /= distributed.get_world_size()
        self.variance[: len(variance)].lerp_(variance, self.momentum)
        self.batches += 1

    @torch.no_grad()
    def measure(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Take the standard deviations of the given residuals.

        Args:
            batches: each A_s of the first n scales, (B, 3, pn_s p, pn_s p).
        """
        squares = torch.zeros(self.schedule.num_scales, dtype=torch.float64)
        counts = torch.zeros_like(squares)
        for residuals in batches:
            n = len(residuals)
            squares[:n] += torch.stack([exact(a).square().sum() for a in residuals]).cpu()
            counts[:n] += torch.tensor([a.numel() for a in residuals])
        self.set_deviations((squares / counts.clamp_min(1)).sqrt().tolist())

    @property
    def deviations(self) -> list[float]:
        """Standard deviation of every scale's residual; 1 where there is none."""
        return [self.std(scale).item() for scale in range(self.schedule.num_scales)]

    @torch.no_grad()
    def set_deviations(self, deviations: Sequence[float]) -> None:
        """Take these standard deviations of all scales, as if of the first batch of a training."""
        self.variance.copy_(self.momentum * torch.tensor(deviations, dtype=torch.float64).square())
        self.batches.fill_(1)

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
