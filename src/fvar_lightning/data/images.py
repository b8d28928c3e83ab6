"""From an image file to a square uint8 tensor: decoding whatever people keep in folders, resizing, cropping."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
EXTENSIONS = (".avif", ".bmp", ".gif", ".jp2", *_JPEG, ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREAD = (".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef")
"""Endings of pictures that are not decoded."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called. Pillow knows more: PostScript, for which it starts Ghostscript."""
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LONGEST = 50
"""Times its shorter side. Resizing the shorter side of a longer strip would fill the memory."""


@functools.cache
def _formats() -> list[str]:
    """Those this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def load_image(path: str | Path | IO[bytes]) -> Image.Image:
    """The picture in a file, upright (EXIF orientation), as 8-bit RGB.

    Grey becomes RGB, transparency is laid on white, CMYK and palettes are converted. Of an animation, the first frame.
    16- and 32-bit integers are scaled down by their full range (65535 if the values fit in it); floats by the smallest
    of 1, 255 and 65535 that holds their maximum, negative ones are black.

    Raises:
        Exception: of many kinds, whatever the decoder meets in a broken file.
        ValueError: for a strip more than `LONGEST` times as long as it is wide.
    """
    with Image.open(path, formats=_formats()) as file:
        if max(file.size) > LONGEST * min(file.size):
            raise ValueError(f"image measures {file.width} x {file.height}, more than {LONGEST} to 1")
        file.load()
        return to_rgb(upright(file))


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as the orientation in its EXIF says.

    Pillow's `exif_transpose` writes the EXIF anew, which fails on tags of a wrong type that cameras do write.
    """
    turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    return picture if turn is None else picture.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a picture of any mode, as `load_image` tells."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """8-bit grey of a grey picture with more than eight bits."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("image holds values that are not finite")
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    full = next((r for r in ranges if values.max() <= r), values.max())
    return Image.fromarray(np.rint(values.clip(min=0) * (255 / full)).astype(np.uint8))


@dataclass(frozen=True)
class ImageTransform:
    """A square of a picture as a uint8 tensor (3, size, size).

    Args:
        size: side of the result in pixels.
        resize: `var`: shorter side to round(1.125 size) by Lanczos, then a crop (VAR's training and evaluation).
            `adm`: halve by boxes while at least twice too large, then shorter side to `size` by bicubic, then a crop
            (`center_crop_arr` of ADM, the way of its reference statistics); with `random_crop` its `random_crop_arr`:
            shorter side to a random length up to `size / 0.8`.
        random_crop: a random position (needs a generator) instead of the centre.
        flip: mirror half of the pictures (needs a generator).

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    size: int
    resize: Literal["var", "adm"] = "var"
    random_crop: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {self.size}")
        if self.resize not in ("var", "adm"):
            raise ValueError(f"resize must be 'var' or 'adm', got {self.resize!r}")

    @property
    def random(self) -> bool:
        """Whether two squares of a picture differ."""
        return self.random_crop or self.flip

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """(3, size, size) uint8 of an RGB picture; `rng` is drawn from only for `random_crop` and `flip`."""
        size = self.size
        if self.resize == "var":
            image = F.resize(image, [round(1.125 * size)], InterpolationMode.LANCZOS)
        else:
            image = resize_adm(image, int(rng.integers(size, math.ceil(size / 0.8) + 1)) if self.random_crop else size)
        room_x, room_y = image.width - size, image.height - size
        if self.random_crop:
            left, top = int(rng.integers(room_x + 1)), int(rng.integers(room_y + 1))
        elif self.resize == "var":
            left, top = round(room_x / 2), round(room_y / 2)  # torchvision's CenterCrop, half to even
        else:
            left, top = room_x // 2, room_y // 2
        square = to_tensor(F.crop(image, top, left, size, size))
        return square.flip(-1) if self.flip and rng.random() < 0.5 else square


def resize_adm(image: Image.Image, side: int) -> Image.Image:
    """ADM's two-step resize: boxes by halves while the shorter side is at least twice `side`, then bicubic to it."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
