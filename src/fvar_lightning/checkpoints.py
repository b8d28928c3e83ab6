"""Weights in files: tokenizers trained here."""

from pathlib import Path
from typing import Any

import torch

from fvar_lightning.tokenizer.build import Tokenizer, build_tokenizer


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents on the CPU, memory-mapped, tensors and plain values only.

    Raises:
        ValueError: if the file is missing, truncated, or holds anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read as weights: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(contents).__name__}, not a dictionary of weights")
    return contents


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `TokenizerTask` checkpoint, in evaluation mode; averaged weights where training kept them.

    Raises:
        ValueError: if the file is no such checkpoint.
    """
    checkpoint = read_checkpoint(path)
    if "tokenizer" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"checkpoint {str(path)!r} is not of a TokenizerTask; it holds {sorted(checkpoint)[:8]}")
    tokenizer = build_tokenizer(**checkpoint["tokenizer"])
    prefix = "tokenizer."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    tokenizer.load_state_dict(weights)
    return tokenizer.eval().requires_grad_(False)
