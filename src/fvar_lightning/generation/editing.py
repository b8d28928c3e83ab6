"""edit(): in-painting, out-painting and class-conditional editing with a trained student, no further training.

What is kept is forced upon the sampling scale by scale, the student makes the rest, and the kept pixels are laid over
the result. Legend: B batch, S scales, pn_s side of token map s, Z latent channels, h = w = pn_S.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fvar_lightning.checks import check_choice
from fvar_lightning.generation.sampling import Progress, Revise, check_models, generate
from fvar_lightning.tokenizer.codebook import exact
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR

Method = Literal["requantise", "var"]

MOSTLY = 0.5
"""A cell with more than this share of hole is the student's to fill."""

RELAXATIONS = 8
"""Averages over neighbours at every level of `fill_hole`: enough that no level's blocks show in the next."""


def edit(
    var: VAR,
    vae: VQVAE,
    images: Tensor,
    mask: Tensor,
    labels: Tensor | None = None,
    *,
    method: Method = "requantise",
    feather: int | None = None,
    guidance: float | Sequence[float] = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    more_smooth: bool = False,
    progress: Progress = iter,
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] with new content where the mask is true and the very same pixels elsewhere.

    ``requantise`` fills the hole smoothly before encoding, so that nothing of the old content is left in the features,
    and forces at every scale the tokens that bring f_hat, with the new content already in it, closest to the kept
    features: Q(z_s - down_s(f_hat)) at the kept cells. A cell that is mostly hole is never forced. ``var`` is what the
    notebook of official VAR does: encode the image as it is, force its tokens at the kept cells, and the 1x1 always.

    Args:
        var: the student.
        vae: its structure tokenizer.
        images: (B, 3, H, W) in [-1, 1], H = W = the schedule's image size.
        mask: (H, W), (B, H, W) or (B, 1, H, W) bool, true where new content goes.
        labels: (B,) int64, the class of the new content; ``None``: unconditional.
        method: how the kept part is forced.
        feather: pixels of the hole along its border over which the new content is shifted to meet the kept pixels,
            see `composite`; ``None``: the side of the image, so that the whole hole is, the far ends less; 0: none.
        guidance, top_k, top_p, seeds, generator, more_smooth, progress: of `generate`.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    check_models(var, vae)
    size = vae.schedule.image_size
    feather = size if feather is None else feather
    check_choice("method", method, Method)
    if feather < 0:
        raise ValueError(f"feather must be 0 or a positive number of pixels, got {feather}")
    _check_images(images, size)
    hole = _as_holes(mask, images)
    if labels is None:
        labels = torch.full((len(images),), var.num_classes, dtype=torch.long, device=images.device)
    if len(labels) != len(images):
        raise ValueError(f"labels must hold one per image ({len(images)}), got {len(labels)}")
    force = requantised(vae, images, hole) if method == "requantise" else replaced(vae, images, hole)
    generated = generate(
        var,
        vae,
        labels,
        guidance=guidance,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        generator=generator,
        more_smooth=more_smooth,
        revise=force,
        progress=progress,
    )
    return composite(images, generated, hole, feather)


@torch.no_grad()
def requantised(vae: VQVAE, images: Tensor, hole: Tensor) -> Revise:
    """Our way: at the kept cells, the tokens of what f_hat still lacks of the features of the filled image.

    Args:
        vae: the structure tokenizer.
        images: (B, 3, H, W).
        hole: (B, 1, H, W) bool.
    """
    features = vae.features(_inputs(vae, fill_hole(images, hole)))
    features = [exact(z) for z in features]
    kept = [rearrange(F.interpolate(hole.float(), z.shape[-2:], mode="area"), "b 1 h w -> b (h w)") for z in features]
    quantizer = vae.quantizer

    def force(s: int, f_hat: Tensor, sampled: Tensor) -> Tensor:
        residual = rearrange(features[s] - quantizer.down(f_hat, s), "b z h w -> (b h w) z")
        return torch.where(kept[s] > MOSTLY, -1, quantizer.codebook.nearest(residual).view_as(sampled))

    return force


@torch.no_grad()
def replaced(vae: VQVAE, images: Tensor, hole: Tensor) -> Revise:
    """VAR's way (its zero-shot editing notebook): the image's own tokens, hole and all, at the kept cells.

    The notebook's mask lives on the last token map, and is resized bilinearly to the others; the first scale is forced
    whole if it is 1x1. Arguments as of `requantised`.
    """
    tokens = vae.encode(_inputs(vae, images))
    sides = vae.schedule.patch_nums
    last = (F.interpolate((~hole).float(), (sides[-1],) * 2, mode="area") >= MOSTLY).float()
    kept = [F.interpolate(last, (n, n), mode="bilinear", align_corners=False).flatten(1) > 0.5 for n in sides]
    if sides[0] == 1:
        kept[0] = torch.ones_like(kept[0])

    def force(s: int, f_hat: Tensor, sampled: Tensor) -> Tensor:
        return torch.where(kept[s], tokens[s], -1)

    return force


def composite(images: Tensor, generated: Tensor, hole: Tensor, feather: int) -> Tensor:
    """The images, bit by bit, outside the hole, and the generated ones in it, (B, 3, H, W).

    A tokenizer reproduces the kept pixels only nearly. Within `feather` pixels of the border the generated content is
    shifted by the difference there, continued smoothly into the hole (seamless cloning, Perez et al. 2003) and fading
    with distance: no step shows, and no detail is blurred away.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        generated: (B, 3, H, W) in [-1, 1].
        hole: (B, 1, H, W) bool.
        feather: pixels, from 0.
    """
    generated = generated.to(images.dtype)
    reached = (~hole).to(images.dtype)
    distance = torch.zeros_like(reached)
    for _ in range(feather):
        if reached.all():
            break
        distance += 1 - reached
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
    weight = 1 - (distance + 1 - reached) / (feather + 1)
    shift = fill_hole(images - generated, hole)
    return torch.where(hole, (generated + weight * shift).clamp(-1, 1), images)


def fill_hole(images: Tensor, hole: Tensor) -> Tensor:
    """Images (B, C, H, W) whose hole (B, 1, H, W) continues its border smoothly; zero where there is no border.

    Pull and push (Gortler et al. 1996, section 3.4): averages of the known pixels at half the size are filled in turn,
    and their enlargement is relaxed towards the mean of its neighbours: a membrane, nearly.
    """
    return _fill(images, (~hole).to(images.dtype))


def _fill(known: Tensor, weight: Tensor) -> Tensor:
    """`known` where `weight` > 0; elsewhere from the averages, by weight, at half the size."""
    fixed = weight > 0
    if max(known.shape[-2:]) == 1 or bool(fixed.all()):
        return known.where(fixed, 0)
    pooled = F.avg_pool2d(weight, 2, ceil_mode=True)
    averages = F.avg_pool2d(known * weight, 2, ceil_mode=True) / pooled.clamp_min(torch.finfo(weight.dtype).tiny)
    filled = F.interpolate(_fill(averages, pooled), known.shape[-2:], mode="bilinear", align_corners=False)
    for _ in range(RELAXATIONS):
        around = F.pad(filled.where(~fixed, known), (1, 1, 1, 1), mode="replicate")
        filled = (around[..., 1:-1, :-2] + around[..., 1:-1, 2:] + around[..., :-2, 1:-1] + around[..., 2:, 1:-1]) / 4
    return known.where(fixed, filled)


def outpaint_canvas(images: Tensor, padding: int | tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """A canvas around pictures for `edit`: images (B, 3, H, W), grey where nothing is yet, and the mask (H, W) of that.

    Args:
        images: (B, 3, h, w) in [-1, 1].
        padding: pixels on the left, right, top and bottom; a number: on every side.

    Raises:
        ValueError: if the padding is negative or none at all.
    """
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(sides) != 4 or min(sides) < 0 or not any(sides):
        raise ValueError(f"padding must be one or four numbers of pixels from 0, not all of them 0, got {padding!r}")
    mask = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    return F.pad(images, sides), F.pad(mask, sides, value=True)


def _inputs(vae: VQVAE, images: Tensor) -> Tensor | list[Tensor]:
    """What the tokenizer encodes of images of any dtype."""
    return vae.inputs(images.to(vae.quant_conv.weight.dtype))


def _check_images(images: Tensor, size: int) -> None:
    if images.shape[1:] != (3, size, size) or images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating-point (B, 3, {size}, {size}), got {images.dtype} {tuple(images.shape)}"
        )
    if len(images) and not -1 <= float(images.min()) <= float(images.max()) <= 1:
        raise ValueError(f"images must lie in [-1, 1], got {float(images.min()):g}..{float(images.max()):g}")


def _as_holes(mask: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) of a mask of any accepted shape."""
    batch, _, height, width = images.shape
    accepted = ((height, width), (batch, height, width), (batch, 1, height, width))
    if mask.dtype != torch.bool or tuple(mask.shape) not in accepted:
        shapes = ", ".join(str(shape) for shape in accepted)
        raise ValueError(f"mask must be bool of one of the shapes {shapes}, got {mask.dtype} {tuple(mask.shape)}")
    return mask.reshape(-1, 1, height, width).expand(batch, 1, height, width)
