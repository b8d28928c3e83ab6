"""Files of official VAR (FoundationVision/VAR) in and out.

Its transformer's parameters bear the same names here, its tokenizer's differ in the quantiser only. What its files hold
beyond weights follows from the token layout: the attention mask and the level of every token.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvar_lightning.atomic import replacing
from fvar_lightning.generation.sampling import check_models
from fvar_lightning.schedule import VAR_PATCH_NUMS, FocusSchedule
from fvar_lightning.tokenizer.autoencoder import VAR_CH_MULT
from fvar_lightning.tokenizer.vqvae import VQVAE, Targets
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.describe import autoencoder_sizes, numbered, rebuild, transformer_sizes
from fvar_lightning.weights.files import read_checkpoint

KNOWN_PATCH_NUMS = (
    VAR_PATCH_NUMS,
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
)
"""Official VAR's token maps for 256, 512 and 1024 px."""

SIGNS = {"tokenizer": "quantize.embedding.weight", "transformer": "pos_1LC"}
NESTED = {"tokenizer": "vae_local", "transformer": "var_wo_ddp"}
USAGE, LEVELS, MASK = "quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking"


def load_var_checkpoint(
    vae_path: str | Path, var_path: str | Path | None = None, *, patch_nums: Sequence[int] | None = None
) -> tuple[VQVAE, VAR | None]:
    """Official VAR's tokenizer and, where a path is given, transformer: on the CPU, in evaluation mode.

    Takes released files (``vae_ch160v4096z32.pth``, ``var_d16.pth``) and training checkpoints (``ar-ckpt-*.pth``). All
    sizes come from the files; without cosine attention, whose temperatures count the heads, heads are width / 64.

    Args:
        vae_path: file of the tokenizer.
        var_path: file of the transformer.
        patch_nums: side of every token map. The transformer's file tells it. The tokenizer's only tells how many there
            are: alone, it is read with official VAR's default for that number (10: 256 px, 14: 1024 px).

    Raises:
        ValueError: if a file is missing, truncated or foreign, the two do not fit each other, or `patch_nums` is
            not to be known or contradicts them; the message says what was found and what was expected.
    """
    var = None
    if var_path is not None:
        var = load_var(read_checkpoint(var_path), str(var_path), patch_nums)
        patch_nums = var.layout.patch_nums
    vae = load_vae(read_checkpoint(vae_path), str(vae_path), patch_nums=patch_nums)
    if var is not None:
        check_models(var, vae)
    return vae, var


def load_vae(
    contents: Mapping[str, Any],
    source: str,
    *,
    patch_nums: Sequence[int] | None = None,
    schedule: FocusSchedule | None = None,
    targets: Targets = "feature",
) -> VQVAE:
    """The tokenizer in an official file, frozen.

    Args:
        contents: of the file, from `read_checkpoint`.
        source: its name, for messages.
        patch_nums: side of every token map, see `load_var_checkpoint`.
        schedule: in its place, a whole schedule: next-focus tokens of the official tokenizer.
        targets: what the tokens stand for, see `VQVAE`.

    Raises:
        ValueError: if the file holds other weights, or those of another number of scales.
    """
    weights = network_weights(contents, "tokenizer", source)
    sizes = _sizes(autoencoder_sizes, weights, source)
    vocab_size, z_channels = weights[SIGNS["tokenizer"]].shape
    if schedule is None:
        patch_nums = _default_patch_nums(weights, source) if patch_nums is None else patch_nums
        schedule = FocusSchedule(tuple(patch_nums), patch_size=2 ** (len(sizes["ch_mult"]) - 1), focus_states=1)
    if "quantize.quant_resi.0.weight" in weights:
        found = numbered(weights, "quantize.quant_resi.")
        if found != schedule.num_scales:
            raise ValueError(
                f"patch_nums {schedule.patch_nums} contradicts {source!r}: it has a phi convolution of its own for "
                f"every one of {found} scales"
            )
    weights = {_our_name(name): tensor for name, tensor in weights.items() if name != USAGE}
    weights |= _codebook_state(weights["quantizer.codebook.embedding.weight"])
    description = {
        "kind": "structure",
        "schedule": schedule,
        "targets": targets,
        "vocab_size": vocab_size,
        "z_channels": z_channels,
        "num_phi": numbered(weights, "quantizer.phi."),
        **sizes,
    }
    vae = rebuild(description, weights, repr(source))
    assert isinstance(vae, VQVAE)
    return vae.requires_grad_(False)


def load_var(contents: Mapping[str, Any], source: str, patch_nums: Sequence[int] | None = None) -> VAR:
    """The transformer in an official file; the arguments of `load_vae`."""
    var = rebuild(*read_var(contents, source, patch_nums), repr(source))
    assert isinstance(var, VAR)
    return var


def read_var(
    contents: Mapping[str, Any], source: str, patch_nums: Sequence[int] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description (see `describe`) and weights of the transformer in an official file; the arguments of `load_vae`."""
    weights = network_weights(contents, "transformer", source)
    description = {"kind": "var"} | _sizes(transformer_sizes, weights, source)
    description["patch_nums"] = list(_known_patch_nums(weights, source, patch_nums))
    description["heads"] = max(description["width"] // 64, 1)
    if description["attn_l2_norm"]:
        description["heads"] = weights["blocks.0.attn.scale_mul_1H11"].shape[1]
    return description, {name: tensor for name, tensor in weights.items() if name not in (LEVELS, MASK)}


def export_var_checkpoint(
    vae: VQVAE, var: VAR | None, vae_path: str | Path, var_path: str | Path | None = None
) -> None:
    """Write files that official VAR's classes load strictly, built with the same sizes; float32, whole or not at all.

    The official code decodes what the transformer samples whatever the tokenizer's targets; tokens of images it makes
    as targets ``feature`` does. Official VAR builds its tokenizer with ch_mult (1, 1, 2, 2, 4), two residual blocks and
    norms of 32 groups: another one is written with a warning, for an official code changed in these places.

    Args:
        vae: the structure tokenizer.
        var: the student; None writes the tokenizer alone.
        vae_path: file for the tokenizer.
        var_path: file for the transformer.

    Raises:
        ValueError: if the two do not fit each other, only one of `var` and `var_path` is given, or the heads of a
            transformer without cosine attention are not width / 64, which no official file can say.
    """
    if (var is None) != (var_path is None):
        raise ValueError(f"var and var_path go together, got {type(var).__name__} and {var_path!r}")
    if var is not None and var_path is not None:
        check_models(var, vae)
        if not var.attn_l2_norm and var.heads != max(var.width // 64, 1):
            raise ValueError(
                f"heads must be width / 64 = {var.width / 64:g} in a file of official VAR without cosine attention, "
                f"got {var.heads}"
            )
    _warn_of_fixed_sizes(vae)
    _save(_official_vae(vae), vae_path)
    if var is not None and var_path is not None:
        _save(_official_var(var), var_path)


def is_official(contents: Mapping[str, Any]) -> bool:
    """Whether these are the contents of a file of official VAR."""
    return "trainer" in contents or any(sign in contents for sign in SIGNS.values())


def network_weights(contents: Mapping[str, Any], network: str, source: str) -> dict[str, Tensor]:
    """The state dictionary of official VAR's `network` (``tokenizer`` or ``transformer``) in the contents of a file.

    Raises:
        ValueError: saying what was found, if there is none.
    """
    trainer = contents.get("trainer")
    weights = trainer.get(NESTED[network], {}) if isinstance(trainer, dict) else contents
    if SIGNS[network] not in weights:
        others = [other for other, sign in SIGNS.items() if sign in weights]
        found = f"official VAR's {others[0]}" if others else f"{sorted(map(str, contents))[:6]}"
        raise ValueError(f"{source!r} does not hold the weights of official VAR's {network}, but {found}")
    foreign = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"{source!r} holds more than the weights of official VAR's {network}: {foreign[:6]}")
    return dict(weights)


def _sizes(
    read: Callable[[Mapping[str, Tensor]], dict[str, Any]], weights: Mapping[str, Tensor], source: str
) -> dict[str, Any]:
    try:
        return read(weights)
    except KeyError as missing:
        raise ValueError(f"{source!r} lacks {missing} of official VAR") from missing


def _default_patch_nums(weights: Mapping[str, Tensor], source: str) -> tuple[int, ...]:
    """The token maps of a tokenizer without a transformer."""
    scales = len(weights[USAGE]) if USAGE in weights else 0
    for known in KNOWN_PATCH_NUMS:
        if len(known) == scales:
            return known
    raise ValueError(
        f"patch_nums cannot be known from {source!r}, a tokenizer of {scales or 'unknown'} scales: "
        "give it as an argument, or the transformer's file"
    )


def _known_patch_nums(weights: Mapping[str, Tensor], source: str, patch_nums: Sequence[int] | None) -> tuple[int, ...]:
    """The token maps of a transformer, as its file has them; `patch_nums` where it does not say."""
    length, scales = weights["pos_1LC"].shape[1], weights["lvl_embed.weight"].shape[0]
    if LEVELS in weights:
        found = {tuple(math.isqrt(n) for n in weights[LEVELS].flatten().bincount().tolist())}
    else:
        found = {p for p in KNOWN_PATCH_NUMS if (len(p), sum(n * n for n in p)) == (scales, length)}
    given = None if patch_nums is None else tuple(patch_nums)
    if given is None and found:
        return found.pop()
    if given is None:
        raise ValueError(
            f"patch_nums cannot be known from {source!r}, which has {scales} scales of {length} tokens together: "
            "give it as an argument"
        )
    if (found and given not in found) or (len(given), sum(n * n for n in given)) != (scales, length):
        raise ValueError(
            f"patch_nums {given} contradicts {source!r}, which has {scales} scales of {length} tokens together"
            + (f": {found.pop()}" if found else "")
        )
    return given


def _codebook_state(codes: Tensor) -> dict[str, Tensor]:
    """What a `Codebook` keeps for training and official files have not."""
    return {
        # one step counted: at none, training would begin by setting the codes anew
        "quantizer.codebook.updates": torch.ones((), dtype=torch.long),
        "quantizer.codebook.counts": torch.ones(len(codes)),
        "quantizer.codebook.sums": codes,
        "quantizer.codebook.idle": torch.zeros(len(codes), dtype=torch.long),
    }


def _our_name(name: str) -> str:
    name = re.sub(r"^quantize\.embedding\.", "quantizer.codebook.embedding.", name)
    name = re.sub(r"^quantize\.quant_resi\.qresi\.", "quantizer.phi.0.", name)
    return re.sub(r"^quantize\.quant_resi\.(qresi_ls\.)?(\d+)\.", r"quantizer.phi.\2.", name)


def _official_vae(vae: VQVAE) -> dict[str, Tensor]:
    num_phi, num_scales = len(vae.quantizer.phi), vae.schedule.num_scales
    # share_quant_resi 1, 0 and any other number; at four of four 4, the default
    if num_phi == 1:
        phi = "quantize.quant_resi.qresi."
    elif num_phi == num_scales != 4:
        phi = r"quantize.quant_resi.\1."
    else:
        phi = r"quantize.quant_resi.qresi_ls.\1."
    weights = {USAGE: torch.zeros(num_scales, vae.vocab_size)}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"^quantizer\.phi\.(\d+)\.", phi, name)
        name = re.sub(r"^quantizer\.codebook\.embedding\.", "quantize.embedding.", name)
        if not name.startswith("quantizer."):
            weights[name] = tensor
    return weights


def _official_var(var: VAR) -> dict[str, Tensor]:
    mask = var.layout.block_causal_mask()
    derived = {LEVELS: var.layout.level_ids()[None], MASK: torch.where(mask, 0.0, -torch.inf)[None, None]}
    return var.state_dict() | derived


def _warn_of_fixed_sizes(vae: VQVAE) -> None:
    sizes = autoencoder_sizes(vae.state_dict()) | {"norm_groups": vae.norm_groups}
    if (*sizes["ch_mult"], sizes["num_res_blocks"], sizes["norm_groups"]) != (*VAR_CH_MULT, 2, 32) or sizes["ch"] % 32:
        warnings.warn(
            f"official VAR builds its tokenizer with ch_mult {VAR_CH_MULT}, num_res_blocks 2 and norms of 32 groups; "
            f"for this one its code must be changed to {sizes}",
            stacklevel=3,
        )


def _save(weights: Mapping[str, Tensor], path: str | Path) -> None:
    whole = {
        name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in weights.items()
    }
    with replacing(path) as beside:
        torch.save({name: tensor.contiguous() for name, tensor in whole.items()}, beside)
