"""LPIPS, frozen, from ImageNet weights in torch's hub folder."""

from pathlib import Path
from typing import Literal

import torch
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from fvar_lightning.tokenizer.efficientnet import UNREADABLE

LPIPSNetwork = Literal["alex", "vgg", "squeeze"]
_HUB_FILES: dict[LPIPSNetwork, str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def lpips_file(network: LPIPSNetwork) -> Path:
    """Where torchvision keeps the ImageNet weights that LPIPS is computed with: in torch's hub folder."""
    return Path(torch.hub.get_dir(), "checkpoints", _HUB_FILES[network])


def load_lpips(network: LPIPSNetwork) -> LearnedPerceptualImagePatchSimilarity:
    """LPIPS of torchmetrics, on images (B, 3, H, W) in [-1, 1], frozen. Downloads missing weights where it may.

    Raises:
        ValueError: naming the file, if it is missing and cannot be downloaded, truncated, or of another network.
    """
    path = lpips_file(network)
    try:
        if path.is_file():
            # torchvision un-pickles the file without asking what is in it
            torch.load(path, map_location="cpu", weights_only=True)
        return LearnedPerceptualImagePatchSimilarity(network).requires_grad_(False)
    except UNREADABLE as error:
        raise ValueError(
            f"LPIPS needs torchvision's weights in {path}: put https://download.pytorch.org/models/{path.name} there "
            f"({error})"
        ) from error
