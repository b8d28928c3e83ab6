"""PNG files that say how they were made, and the contact sheet of many."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.atomic import replacing
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.metrics.pictures import tile
from fvar_lightning.weights.identity import versions

SHEET_SIDE = 256
SHEET_ROW = 10


def check_absent(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace files, unless that is asked for."""
    existing = [str(file) for file in files if file.exists()]
    if existing and not overwrite:
        shown = f"{', '.join(existing[:3])}{f' and {len(existing) - 3} more' if len(existing) > 3 else ''}"
        raise ValueError(f"output exists: {shown}; choose another, or --overwrite true")


def about(settings: Mapping[str, Any], command: Sequence[str]) -> dict[str, str]:
    """Text for an image's file: settings, versions, and the command that makes it again."""
    texts = {name: str(value) for name, value in settings.items() if value is not None}
    return texts | {"versions": json.dumps(versions()), "command": shlex.join(command)}


def write_png(image: Tensor, path: Path, texts: Mapping[str, str]) -> None:
    """(3, H, W) in [-1, 1] -> an 8-bit PNG with texts, whole or not at all."""
    save_png(Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()), path, texts)


def save_png(picture: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """A picture with texts, whole or not at all."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    with replacing(path) as beside:
        picture.save(beside, format="PNG", pnginfo=info)


def contact_sheet(rows: Sequence[Sequence[Tensor]], names: Sequence[str]) -> Image.Image:
    """Images (3, H, W) in [-1, 1], a block of rows for each class, shrunk to 256 px if they are larger."""
    size = rows[0][0].shape[-1]
    side = min(size, SHEET_SIDE)
    parts: list[list[Tensor]] = []
    heads: list[str] = []
    for row, name in zip(rows, names, strict=True):
        for start in range(0, len(row), SHEET_ROW):
            parts.append([F.adaptive_avg_pool2d(image, side) for image in row[start : start + SHEET_ROW]])
            heads.append("" if start else name)
    return tile(parts, heads, side=side)
