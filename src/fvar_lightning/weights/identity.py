"""What makes a figure traceable: hashes of checkpoints and weights, and versions."""

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvar_lightning.tokenizer.build import Tokenizer

PACKAGES = ("fvar-lightning", "torch", "torchvision", "lightning", "torchmetrics", "torch-fidelity", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, or of the names and contents of all files in a folder (sharded checkpoints)."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return _stream_sha256(file)
    whole = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{part.relative_to(path).as_posix()} {file_sha256(part)}\n".encode())
    return whole.hexdigest()


def _stream_sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of names, shapes and values of weights; of sharded ones all ranks must ask."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        # a DTensor; importing the class, to ask for it, takes a second
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hexadecimal SHA-256 of the weights that tokens depend on: encoder, quantiser and codes, but not the decoder, nor
    the statistics by which a codebook trains."""
    return weights_sha256({name: x for name, x in tokenizer.state_dict().items() if not _NO_TOKENS.match(name)})


_NO_TOKENS = re.compile(r"decoder\.|post_quant_conv\.|(.*\.)?codebook\.(updates|counts|sums|idle)$")
