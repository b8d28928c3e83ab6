"""VQVAE: the structure tokenizer Q_L. Images or their focus states in, token maps out, and back.

Legend: B batch, S scales, K focus states, pn_s side of token map s, Z latent channels, h = w = pn_S.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fvar_lightning.checks import check_choice, check_positive
from fvar_lightning.optics.psf import check_psf
from fvar_lightning.optics.refocus import Refocus, Views
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.autoencoder import VAR_CH_MULT, Decoder, Encoder
from fvar_lightning.tokenizer.codebook import Codebook, exact
from fvar_lightning.tokenizer.quantizer import MultiScaleQuantizer, Quantized

Targets = Literal["view", "full", "feature"]


def check_patch_size(schedule: FocusSchedule, ch_mult: Sequence[int]) -> None:
    """Refuse an autoencoder whose down-sampling factor is not the schedule's patch size."""
    factor = 2 ** (len(ch_mult) - 1)
    if factor != schedule.patch_size:
        raise ValueError(
            f"ch_mult {tuple(ch_mult)} down-samples by {factor}, but patch_size is {schedule.patch_size}: "
            "give ch_mult one entry more for every doubling of patch_size"
        )


class VQVAE(nn.Module):
    """Multi-scale VQ autoencoder of VAR's shape (official: 4096 codes, Z = 32, ch = 160).

    Args:
        schedule: token layout and focus states.
        targets: what the token map of scale s stands for: ``view``: features of the focused view s; ``full``: features
            of the full-size focus state of scale s, area-averaged; ``feature``: features of the sharp image,
            area-averaged (VAR).
        psf: point-spread function of the focus states it encodes, see `Refocus`; kept as None with targets ``feature``,
            which see no blur.
        vocab_size: codes.
        z_channels: Z.
        ch: base width of the autoencoder.
        ch_mult: width of each resolution as a multiple of `ch`; its length sets the down-sampling factor.
        num_res_blocks: residual blocks per resolution.
        norm_groups: groups of the GroupNorms (official: 32); where they do not divide a layer's channels, as many as
            do.
        num_phi: phi convolutions shared among the scales, see `MultiScaleQuantizer`.
        sharp_commitment: targets ``view`` only: weight of the commitment of the sharp image's features to f_hat after
            every scale, which keeps the features of different views together, see `MultiScaleQuantizer`.
        codebook: further arguments of `Codebook` (decay, warmup_steps, revive_after).

    Raises:
        ValueError: if `ch_mult` does not fit the schedule's patch size, `targets` or `psf` is unknown, a size is below
            1, or `sharp_commitment` is negative or given for other targets.
    """

    def __init__(
        self,
        schedule: FocusSchedule,
        *,
        targets: Targets = "view",
        psf: str | None = "disk",
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 160,
        ch_mult: Sequence[int] = VAR_CH_MULT,
        num_res_blocks: int = 2,
        norm_groups: int = 32,
        num_phi: int | None = None,
        sharp_commitment: float = 0.0,
        **codebook: Any,
    ) -> None:
        super().__init__()
        check_patch_size(schedule, ch_mult)
        check_choice("targets", targets, Targets)
        if sharp_commitment < 0 or (sharp_commitment > 0 and targets != "view"):
            raise ValueError(
                "sharp_commitment must not be negative, and is 0 for targets other than 'view', got "
                f"{sharp_commitment} for {targets!r}"
            )
        sizes = {"ch": ch, "z_channels": z_channels, "num_res_blocks": num_res_blocks, "norm_groups": norm_groups}
        check_positive(sizes)
        self.schedule = schedule
        self.targets = targets
        self.psf = None if targets == "feature" else check_psf(psf)
        self.z_channels = z_channels
        self.norm_groups = norm_groups
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels, norm_groups)
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(
            schedule.patch_nums,
            Codebook(vocab_size, z_channels, cosine=False, **codebook),
            num_phi=num_phi,
            sharp_commitment=sharp_commitment,
        )
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels, norm_groups)

    @property
    def codebook(self) -> Codebook:
        """The quantiser's."""
        return self.quantizer.codebook

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.codebook.vocab_size

    def codes(self, indices: Tensor) -> Tensor:
        """Codebook vectors: (...) indices -> (..., Z)."""
        return self.codebook(indices)

    @cached_property
    def refocus(self) -> Refocus:
        """The optics whose views it encodes."""
        assert self.psf is not None
        return Refocus(self.schedule, self.psf)

    def inputs(
        self, images: Tensor, views: Views | None = None, blurred: Sequence[Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        """What `encode` takes of images (B, 3, H, W) in [-1, 1], as the targets ask.

        Args:
            images: of the schedule's size.
            views, blurred: what the tokenizer's optics make of them, where that is at hand (`ImageBatch`).
        """
        if self.targets == "feature":
            return images
        blurred = self.refocus.blur(images) if blurred is None else blurred
        if self.targets == "full":
            return list(blurred)
        return (self.refocus.views(images, blurred) if views is None else views).focused

    def features(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """z_s, S tensors (B, Z, pn_s, pn_s); takes what `encode` takes."""
        return self._averaged(self._encoder_maps(x))

    def _averaged(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if self.targets == "view":
            return list(maps)
        return [self.quantizer.down(f, s) for s, f in enumerate(maps)]

    def _encoder_maps(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The encoder's output for every scale, before any averaging."""
        if self.targets == "feature":
            if not isinstance(x, Tensor):
                raise ValueError(f"targets 'feature' takes one tensor of images, got {type(x).__name__}")
            return [self._encode_image(x)] * self.schedule.num_scales
        wanted = self.schedule.num_scales if self.targets == "view" else self.schedule.focus_states
        if isinstance(x, Tensor) or len(x) != wanted:
            got = "one tensor" if isinstance(x, Tensor) else f"{len(x)} tensors"
            raise ValueError(f"targets {self.targets!r} takes a list of {wanted} tensors, got {got}")
        maps = [self._encode_image(view) for view in x]
        return maps if self.targets == "view" else [maps[k] for k in self.schedule.states]

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Quantized:
        """Encode and quantise for training; decode a stage with `decode_features`. The codebook's `step` is to follow
        the optimiser's."""
        maps = self._encoder_maps(x)
        return self.quantizer(self._averaged(maps), maps)

    @torch.no_grad()
    def encode(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Token maps, S tensors (B, pn_s^2) int64.

        Args:
            x: images (B, 3, H, W) in [-1, 1] (targets ``feature``), the list of S views (``view``) or of K full-size
                focus states (``full``).
        """
        return self.quantizer.encode(self.features(x))

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """(B, Z, h, w) -> images (B, 3, H, W), not clamped, in the precision of the weights."""
        return self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype)))

    def image(self, f_hat: Tensor) -> Tensor:
        """(B, Z, h, w) -> images (B, 3, H, W), clamped to [-1, 1], float32 at least."""
        return exact(self.decode_features(f_hat)).clamp(-1, 1)

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        """S token maps (B, pn_s^2) -> images (B, 3, H, W), clamped to [-1, 1]."""
        return self.image(self.quantizer.stages(indices)[-1])

    @torch.no_grad()
    def decode_stages(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """The image after every scale, coarse to sharp: S tensors (B, 3, H, W), clamped to [-1, 1]."""
        return [self.image(f_hat) for f_hat in self.quantizer.stages(indices)]

    @torch.no_grad()
    def var_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """Teacher-forcing input of `VAR`: S token maps -> (B, L - pn_1^2, Z)."""
        return self.quantizer.var_inputs(indices)
