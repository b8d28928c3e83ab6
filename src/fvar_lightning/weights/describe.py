"""describe() and rebuild(): networks to and from plain dictionaries, which files keep beside their weights."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.build import Tokenizer, build_tokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR

Network = VAR | Tokenizer
AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)


def describe(network: Network) -> dict[str, Any]:
    """The constructor's arguments as plain values, but those that only training heeds (`initial_gain`, `recompute`,
    `sharp_commitment`), and under ``kind`` which constructor: ``structure``, ``alias`` (see `build_tokenizer`) or
    ``var``."""
    if isinstance(network, VAR):
        return {
            "kind": "var",
            "patch_nums": list(network.layout.patch_nums),
            "drop_path_rate": network.blocks[-1].drop_path_rate,
            "heads": network.heads,
            **transformer_sizes(network.state_dict()),
        }
    description = {
        "kind": "structure" if isinstance(network, VQVAE) else "alias",
        "schedule": plain(network.schedule),
        "psf": network.psf,
        "vocab_size": network.vocab_size,
        "z_channels": network.z_channels,
        "decay": network.codebook.decay,
        "warmup_steps": network.codebook.warmup_steps,
        "revive_after": network.codebook.revive_after,
    }
    if isinstance(network, VQVAE):
        description |= autoencoder_sizes(network.state_dict()) | {"norm_groups": network.norm_groups}
        return description | {"targets": network.targets, "num_phi": len(network.quantizer.phi)}
    description |= {"ch": network.encoder.patch.out_channels, "num_res_blocks": len(network.encoder.blocks)}
    return description | {"momentum": network.momentum, "commitment": network.commitment}


def plain(schedule: FocusSchedule) -> dict[str, Any]:
    """The schedule as plain values."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(schedule).items()}


def build(description: Mapping[str, Any]) -> Network:
    """The network a description stands for, freshly initialised.

    Raises:
        ValueError: if the description is of no network of this library.
    """
    arguments = dict(description)
    try:
        if arguments.get("kind") == "var":
            del arguments["kind"]
            return VAR(arguments.pop("patch_nums"), **arguments)
        return build_tokenizer(**arguments)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the description of a network has missing or unknown entries: {error}") from error


def rebuild(description: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Network:
    """The described network with the given weights, on the CPU, in evaluation mode.

    Args:
        description: from `describe`.
        weights: a whole state dictionary.
        source: where they come from, for the message.

    Raises:
        ValueError: if the weights are of another network; the message names what differs.
    """
    # initialising two billion parameters only to overwrite them would take minutes
    with torch.device("meta"):
        network = build(description)
    check_weights({name: tensor.shape for name, tensor in network.state_dict().items()}, weights, source)
    network.to_empty(device="cpu")
    if isinstance(network, VAR):
        network.level_ids = network.layout.level_ids()
    network.load_state_dict(dict(weights))
    return network.eval()


def at_schedule(tokenizer: AnyTokenizer, schedule: FocusSchedule) -> AnyTokenizer:
    """A tokenizer with the same weights for other token maps and focus states, as VAR's serves several resolutions.

    The scales share the phi convolutions of a structure tokenizer, however many they are, and all weights of an alias
    tokenizer but the deviations of its residuals, which are to be found anew (`AliasTokenizer.measure`).

    Args:
        tokenizer: is left as it is.
        schedule: of the same patch size.

    Raises:
        ValueError: if the patch size is another.
    """
    if schedule.patch_size != tokenizer.schedule.patch_size:
        raise ValueError(
            f"patch_size of the schedule must be the tokenizer's {tokenizer.schedule.patch_size}, "
            f"got {schedule.patch_size}"
        )
    weights = tokenizer.state_dict()
    if isinstance(tokenizer, AliasTokenizer):
        weights |= {"variance": torch.zeros(schedule.num_scales), "batches": torch.zeros_like(weights["batches"])}
    network = rebuild(describe(tokenizer) | {"schedule": plain(schedule)}, weights, "the tokenizer")
    assert isinstance(network, type(tokenizer))
    return network.requires_grad_(False)


def check_weights(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that have not exactly the expected names and shapes.

    Raises:
        ValueError: naming the source and what differs.
    """
    missing = [name for name in shapes if name not in weights]
    unknown = [name for name in weights if name not in shapes]
    other = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    differences = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unknown), ("of another shape", other))
        if names
    ]
    if differences:
        raise ValueError(f"{source} does not fit: {'; '.join(differences)}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What two descriptions both name and disagree in, for a message: "width is 32, not 64"; empty if nothing."""
    unequal = [name for name in wanted if name in found and found[name] != wanted[name]]
    return ", ".join(f"{name} is {found[name]}, not {wanted[name]}" for name in unequal)


def autoencoder_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """``ch``, ``ch_mult`` and ``num_res_blocks`` of the encoder in a tokenizer's weights, whose names are VAR's."""
    ch = weights["encoder.conv_in.weight"].shape[0]
    levels = numbered(weights, "encoder.down.")
    widths = [weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": numbered(weights, "encoder.down.0.block."),
    }


def transformer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a VAR in its weights, whose names are VAR's; not the heads, which plain attention does not show."""
    width, z_channels = weights["word_embed.weight"].shape
    return {
        "vocab_size": weights["head.weight"].shape[0],
        "z_channels": z_channels,
        "num_classes": weights["class_emb.weight"].shape[0] - 1,
        "depth": numbered(weights, "blocks."),
        "width": width,
        "mlp_ratio": weights["blocks.0.ffn.fc1.weight"].shape[0] / width,
        "shared_aln": "blocks.0.ada_gss" in weights,
        "attn_l2_norm": "blocks.0.attn.scale_mul_1H11" in weights,
    }


def numbered(names: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow `prefix` among the names."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
