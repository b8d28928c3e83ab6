"""The frozen tokenizers of stage 2: out of files or descriptions, and at the data module's schedule."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.build import Tokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.checkpoints import load_tokenizer
from fvar_lightning.weights.describe import at_schedule, build

Source = str | dict[str, Any]
"""Checkpoint of a tokenizer, or its description where the weights come later."""

MEASURED = 256
"""Training images on which the deviations of the alias residuals of another schedule are measured."""


def frozen_tokenizers(structure: Source, alias: Source | None) -> tuple[VQVAE, AliasTokenizer | None]:
    """Both tokenizers, frozen, in evaluation mode.

    Raises:
        ValueError: if one is of the wrong kind, or the two see other views.
    """
    vae = _frozen(structure)
    if not isinstance(vae, VQVAE):
        raise ValueError(f"structure_tokenizer {structure!r} holds an alias tokenizer")
    if alias is None:
        return vae, None
    tokenizer = _frozen(alias)
    if not isinstance(tokenizer, AliasTokenizer):
        raise ValueError(f"alias_tokenizer {alias!r} holds a structure tokenizer")
    for name in ("schedule", "psf"):
        ours, theirs = getattr(vae, name), getattr(tokenizer, name)
        if ours not in (theirs, None):
            raise ValueError(
                f"{name} of the two tokenizers must be equal: structure_tokenizer {ours}, alias_tokenizer {theirs}"
            )
    return vae, tokenizer


def _frozen(source: Source) -> Tokenizer:
    if isinstance(source, str):
        return load_tokenizer(source)
    tokenizer = build(source)
    if isinstance(tokenizer, VAR):
        raise ValueError("a tokenizer is described as a transformer")
    return tokenizer.requires_grad_(False).eval()


def at_data_schedule(vae: VQVAE, alias: AliasTokenizer | None, trainer: Trainer) -> tuple[VQVAE, AliasTokenizer | None]:
    """The tokenizers at the schedule of the trainer's data module, where its images have another size than those they
    were trained on. (At the same size a difference is an oversight, and refused later.)

    Raises:
        ValueError: if the patch sizes differ, or the data module tells nothing of the alias residuals.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    schedule = data.train.meta.schedule if isinstance(data, TokenDataModule) else getattr(data, "schedule", None)
    if schedule is None or schedule.image_size == vae.schedule.image_size:
        return vae, alias
    for name, tokenizer in (("structure_tokenizer", vae), ("alias_tokenizer", alias)):
        if tokenizer is not None:
            rank_zero_info(f"{name} was trained for {tokenizer.schedule}; it serves {schedule}")
    if alias is not None:
        alias = at_schedule(alias, schedule)
        alias.set_deviations(_deviations(alias, trainer))
    return at_schedule(vae, schedule), alias


def _deviations(alias: AliasTokenizer, trainer: Trainer) -> list[float]:
    """Of the residuals of the trainer's data module: as its token cache notes them, or measured by one rank for all."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, TokenDataModule) and data.train.meta.alias_deviations is not None:
        return data.train.meta.alias_deviations
    if not isinstance(data, ImageDataModule):
        raise ValueError(
            "alias_tokenizer at another image size needs an ImageDataModule to measure residuals, or a token cache "
            f"that notes them, got {type(data).__name__}"
        )
    if trainer.is_global_zero:
        alias.measure(_residuals(data, trainer.strategy.root_device))
    return trainer.strategy.broadcast(alias.deviations)


def _residuals(data: ImageDataModule, device: torch.device) -> Iterator[list[Tensor]]:
    """Alias residuals of `MEASURED` training images, spread evenly over all of them and cropped as for validation."""
    images = data.real_images("train")
    count = min(MEASURED, len(images))
    rows = [i * len(images) // count for i in range(count)]
    for start in range(0, count, data.batch_size):
        pixels = torch.stack([images[i][0] for i in rows[start : start + data.batch_size]])
        yield data.on_after_batch_transfer([pixels.to(device), torch.zeros(len(pixels))], 0).views.alias
