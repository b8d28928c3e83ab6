"""The official code (github.com/FoundationVision/VAR), imported from a checkout of it."""

import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from golden.recipe import CONFIGS, DERIVED, Config, weights


def official_modules(repo: str | Path) -> tuple[ModuleType, ModuleType]:
    """Its ``models.vqvae`` and ``models.var``.

    Raises:
        ValueError: if they are not there.
    """
    if not (Path(repo) / "models" / "var.py").is_file():
        raise ValueError(f"VAR_REPO {str(repo)!r} is no checkout of the official code: it has no models/var.py")
    sys.path.insert(0, str(repo))
    try:
        return importlib.import_module("models.vqvae"), importlib.import_module("models.var")
    finally:
        sys.path.remove(str(repo))


def build_official(repo: str | Path, config: Config) -> tuple[nn.Module, nn.Module]:
    """Its tokenizer and transformer of these sizes, in evaluation mode, without label dropout."""
    vqvae, var = official_modules(repo)
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = vqvae.VQVAE(
            config.vocab_size,
            config.z_channels,
            config.ch,
            share_quant_resi=config.share_quant_resi,
            v_patch_nums=config.patch_nums,
        )
        transformer = var.VAR(
            tokenizer,
            num_classes=config.num_classes,
            depth=config.depth,
            embed_dim=config.width,
            num_heads=config.heads,
            shared_aln=config.shared_aln,
            attn_l2_norm=config.attn_l2_norm,
            patch_nums=config.patch_nums,
            cond_drop_rate=0.0,
        )
    return tokenizer.eval(), transformer.eval().requires_grad_(False)


def official_by_recipe(repo: str | Path, config: str) -> tuple[nn.Module, nn.Module]:
    """The networks of a configuration with the recipe's weights."""
    networks = build_official(repo, CONFIGS[config])
    for network in networks:
        shapes = {name: tuple(x.shape) for name, x in network.state_dict().items() if not name.endswith(DERIVED)}
        network.load_state_dict(network.state_dict() | weights(config, shapes), strict=True)
    return networks


def perturbed(network: nn.Module, size: float) -> None:
    """Change every weight by the given relative size: what another machine's rounding may amount to."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1 + size * torch.randn(p.shape, generator=generator))
