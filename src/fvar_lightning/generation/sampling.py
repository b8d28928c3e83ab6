"""generate(): class-conditional sampling, scale by scale (VAR's procedure; only the student is needed).

Legend: B batch, S scales, l tokens of one scale, V codebook, Z latent channels.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fvar_lightning.generation.focus import refocused
from fvar_lightning.generation.guidance import ramp
from fvar_lightning.tokenizer.codebook import exact
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.layers import KVCache
from fvar_lightning.transformer.var import VAR, Condition

Revise = Callable[[int, Tensor, Tensor], Tensor]
"""(scale, f_hat (B, Z, h, w) before it, sampled tokens (B, l)) -> tokens (B, l) to force, -1 where to leave it be."""

Progress = Callable[[Iterable[Tensor]], Iterable[Tensor]]
"""Wraps f_hat after every scale, as `tqdm` does."""


def check_models(var: VAR, vae: VQVAE) -> None:
    """Refuse a student and a tokenizer that do not speak the same tokens."""
    for name, a, b in (
        ("patch_nums", var.layout.patch_nums, vae.schedule.patch_nums),
        ("vocab_size", var.vocab_size, vae.vocab_size),
        ("z_channels", var.z_channels, vae.z_channels),
    ):
        if a != b:
            raise ValueError(f"{name} of the student and of the tokenizer must be equal, got {a} and {b}")


def guidance_scales(guidance: float | Sequence[float], num_scales: int) -> list[float]:
    """Strength t of classifier-free guidance at every scale: a number ramps up from 0 as in VAR, a sequence is taken.

    Raises:
        ValueError: for a negative or infinite strength, or a sequence that has not S entries.
    """
    strengths = check_guidance(guidance)
    if isinstance(guidance, int | float):
        return ramp(guidance, num_scales)
    if len(strengths) != num_scales:
        raise ValueError(f"guidance must hold one strength for each of the {num_scales} scales, got {guidance!r}")
    return strengths


def check_guidance(guidance: float | Sequence[float]) -> list[float]:
    """The strengths: one, or one for each of as many scales as there may be.

    Raises:
        ValueError: for what is no number, negative or infinite.
    """
    try:
        strengths = [float(t) for t in ([guidance] if isinstance(guidance, int | float) else guidance)]
    except (TypeError, ValueError):
        strengths = []
    if not strengths or not all(0 <= t < float("inf") for t in strengths):
        raise ValueError(f"guidance must be a finite number from 0, or one for each of the scales, got {guidance!r}")
    return strengths


class Noise:
    """Exponential noise for B images: from one generator for the whole batch, or one seed per image.

    A categorical draw is argmax(p / noise), as `torch.multinomial` computes a single draw; so one generator
    reproduces a batch of the official code, and a seed per image gives what that code makes of the image alone.

    Raises:
        ValueError: if both are given, or seeds of another number than images.
    """

    def __init__(
        self, batch: int, device: torch.device, seeds: Sequence[int] | Tensor | None, generator: torch.Generator | None
    ) -> None:
        if seeds is not None and generator is not None:
            raise ValueError("give seeds or a generator, not both")
        if seeds is not None and len(seeds) != batch:
            raise ValueError(f"seeds must hold one per image ({batch}), got {len(seeds)}")
        self.generator = generator
        self.per_image = None
        if seeds is not None:
            numbers = seeds.tolist() if isinstance(seeds, Tensor) else seeds
            self.per_image = [torch.Generator(device).manual_seed(int(seed)) for seed in numbers]

    def like(self, x: Tensor) -> Tensor:
        """Noise of the shape of x (B, l, V)."""
        noise = torch.empty_like(x)
        if self.per_image is None:
            return noise.exponential_(generator=self.generator)
        for image, generator in zip(noise, self.per_image, strict=True):
            image.exponential_(generator=generator)
        return noise


def check_truncation(top_k: int, top_p: float) -> None:
    """Refuse values that `truncate` has no meaning for.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must lie in [0, 1] (0: off), got {top_p}")


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, l, V) logits with all but the `top_k` best, and of these all but the `top_p` mass, at minus infinity.

    Logits that equal the last one kept stay too, as in official VAR: at half precision there are many.
    """
    if top_k == 0 and top_p == 0:
        return logits
    vocab = logits.shape[-1]
    best = logits.topk(min(top_k, vocab) if top_k > 0 else vocab, dim=-1, sorted=top_p > 0).values
    if top_p > 0:
        best = best.flip(-1)
        remove = best.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[..., -1].fill_(False)
        best = best.masked_fill(remove, torch.inf)
    return logits.masked_fill(logits < best.amin(-1, keepdim=True), -torch.inf)


def generate(
    var: VAR,
    vae: VQVAE,
    labels: Tensor,
    *,
    guidance: float | Sequence[float] = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    more_smooth: bool = False,
    focus: float = 0.0,
    revise: Revise | None = None,
    progress: Progress = iter,
) -> Tensor:
    """Images of the given classes, (B, 3, H, W) in [-1, 1], float32 at least.

    Of models in half precision, or under autocast, only the transformer and the decoder compute in it: quantiser and
    sampling stay in float32. Whether the models are in training mode makes no difference.

    Args:
        var: the student.
        vae: its structure tokenizer.
        labels: (B,) int64 on the models' device, 0..num_classes (num_classes: the null class).
        guidance: classifier-free guidance; a number g means g * s / (S - 1) at scale s (VAR), a sequence of S numbers
            is taken as it is (`ramp`, `constant` and `interval` of `fvar_lightning.generation.guidance` make some).
            The unconditional half is computed up to the last scale whose strength is not 0.
        top_k: keep the k likeliest tokens, 0: all; more than V means all.
        top_p: of these, keep the likeliest that hold this probability, 0: all.
        seeds: one per image: the image is then the same alone or in any batch.
        generator: one for the whole batch; without either, torch's default generator draws.
        more_smooth: mix codes by Gumbel softmax instead of drawing one (for pictures, not for evaluation).
        focus: blur of the image, any radius between the schedule's largest and 0, sharp; in pixels at full resolution,
            see `fvar_lightning.generation.focus`. The same seeds give the same image at every focus.
        revise: may force tokens at every scale (editing); they escape `more_smooth`.
        progress: passes on f_hat after every scale, of which a sharp image takes S.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    stages = sample(
        var,
        vae,
        labels,
        guidance=guidance,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        generator=generator,
        more_smooth=more_smooth,
        revise=revise,
    )
    with torch.no_grad():
        f_hat = refocused(progress(stages), vae.schedule, focus)
        stages.close()  # and with it the transformer's cache: the decoder needs the memory
        return vae.image(f_hat)


def generate_stages(var: VAR, vae: VQVAE, labels: Tensor, **options: Any) -> list[Tensor]:
    """The image after every scale, coarse to sharp: S tensors (B, 3, H, W) in [-1, 1]. Takes what `generate` takes."""
    with torch.no_grad():
        return [vae.image(f_hat) for f_hat in sample(var, vae, labels, **options)]


@torch.no_grad()
def sample(
    var: VAR,
    vae: VQVAE,
    labels: Tensor,
    *,
    guidance: float | Sequence[float] = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    more_smooth: bool = False,
    revise: Revise | None = None,
) -> Generator[Tensor, None, None]:
    """f_hat (B, Z, h, w) after every scale; the arguments and errors of `generate`."""
    check_models(var, vae)
    conditional = _any_conditional(labels, var.num_classes)
    check_truncation(top_k, top_p)
    layout, quantizer = var.layout, vae.quantizer
    strengths = guidance_scales(guidance, layout.num_scales)
    noise = Noise(len(labels), labels.device, seeds, generator)
    batch = len(labels)
    guided = any(strengths) and conditional
    if guided:
        labels = torch.cat((labels, torch.full_like(labels, var.num_classes)))

    condition = var.condition(labels)
    modulations = var.modulations(condition)
    positions = var.positions()
    cache = KVCache(var.depth, layout.length)
    size = layout.patch_nums[-1]
    f_hat = exact(quantizer.codebook.embedding.weight.new_zeros(batch, var.z_channels, size, size))
    tokens = var.start(condition) + positions[:, layout.slices[0]]
    for s, t in enumerate(strengths):
        if guided and not any(strengths[s:]):
            guided = False
            condition = Condition(*(x[:batch] for x in condition))
            modulations = [modulation[:batch] for modulation in modulations]
            tokens = tokens[:batch]
            cache.keep(batch)
        hidden = var.step(tokens, modulations, cache)
        logits = _guided_logits(var, hidden, condition, t) if guided else var.logits(hidden, condition)
        logits = truncate(exact(logits), top_k, top_p)
        probabilities = logits.softmax(-1)
        indices = (probabilities / noise.like(probabilities)).argmax(-1)
        code = quantizer.code_map(indices)
        if more_smooth:
            code = _smooth_code(logits, s / max(layout.num_scales - 1, 1), noise, quantizer.codebook.embedding.weight)
        if revise is not None:
            forced = revise(s, f_hat, indices)
            free = (forced < 0).view(batch, 1, *code.shape[-2:])
            code = torch.where(free, code, quantizer.code_map(forced.clamp_min(0)))
        f_hat = quantizer.add(f_hat, code, s)
        yield f_hat
        if s + 1 < layout.num_scales:
            inputs = quantizer.next_input(f_hat, s).to(var.word_embed.weight.dtype)
            tokens = var.word_embed(inputs.repeat(2 if guided else 1, 1, 1)) + positions[:, layout.slices[s + 1]]


def _guided_logits(var: VAR, hidden: Tensor, condition: Condition, t: float) -> Tensor:
    """(1 + t) cond - t uncond, mixed before the linear classifier, which halves its work."""
    conditional, free = var.head_nm(hidden, condition.embedding).chunk(2)
    return var.head(conditional if t == 0 else (1 + t) * conditional - t * free)


def _smooth_code(logits: Tensor, ratio: float, noise: Noise, codes: Tensor) -> Tensor:
    """VAR's Gumbel-softmax mixture of codes, (B, Z, pn, pn); `ratio` is s / (S - 1)."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = ((logits * (1 + ratio) - noise.like(logits).log()) / temperature).softmax(-1)
    batch, length, _ = logits.shape
    side = round(length**0.5)
    with torch.autocast(logits.device.type, enabled=False):
        mixed = weights @ codes.to(weights.dtype)
    return mixed.transpose(1, 2).reshape(batch, codes.shape[1], side, side)


def _any_conditional(labels: Tensor, num_classes: int) -> bool:
    """Whether any label names a class, once they are checked. Nothing else in sampling waits for the device."""
    if labels.dim() != 1 or labels.dtype != torch.long:
        raise ValueError(f"labels must be a 1-d int64 tensor, got {labels.dtype} of shape {tuple(labels.shape)}")
    if len(labels) == 0:
        return False
    low, high = (int(label) for label in labels.aminmax())
    if not 0 <= low <= high <= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes} ({num_classes}: the null class), got {low}..{high}")
    return low < num_classes
