"""Reading files of weights: tensors and plain values only."""

import zipfile
from pathlib import Path
from typing import Any

import torch

SHARDED_PLAIN = "meta.pt"
"""Where a sharded checkpoint, a folder, keeps what is no tensor, hyper-parameters among it."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents on the CPU, memory-mapped, tensors and plain values only.

    Raises:
        ValueError: if the file is missing, truncated, or holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"checkpoint {str(path)!r} is a folder; a sharded checkpoint becomes one file by "
            "`python -m lightning.fabric.utilities.consolidate_checkpoint FOLDER`"
        )
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        # files from before torch 1.6 are no archives and cannot be mapped
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read as weights: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(contents).__name__}, not a dictionary of weights")
    return contents
