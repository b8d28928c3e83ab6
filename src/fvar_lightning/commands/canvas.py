"""What `edit` takes of a photograph and a mask of any size: a square and its hole."""

from typing import NamedTuple

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.data.images import to_rgb, to_tensor, upright
from fvar_lightning.data.pixels import to_unit_range
from fvar_lightning.generation.editing import outpaint_canvas

HALF = 128
"""Of 255: from here on a mask is white, and a picture is there."""


class Canvas(NamedTuple):
    """Arguments of `edit`, and what became of the photograph."""

    image: Tensor
    """(1, 3, size, size) in [-1, 1]."""
    hole: Tensor
    """(size, size) bool, true where new content goes."""
    message: str
    """What became of the photograph, for its owner."""


def make_canvas(image: str, mask: str | None, margins: tuple[int, int, int, int], size: int) -> Canvas:
    """A square with the photograph's middle in it, resized to fill all but the margins.

    Args:
        image: file of any size. Its transparent parts are hole where no mask is given.
        mask: file of the photograph's size or proportions, white where new content goes, black or transparent
            elsewhere.
        margins: pixels of new content on the left, right, top and bottom.
        size: side of the square in pixels.

    Raises:
        ValueError: if a file cannot be read, the mask does not fit, no pixel is hole, or the margins leave no room.
    """
    photograph = _open("image", image)
    if mask is None and photograph.has_transparency_data:
        photograph = photograph.convert("RGBA")  # resizing leaves out the colours of what is transparent
        holes = photograph.getchannel("A").point(lambda alpha: 255 * (alpha < HALF))
    else:
        photograph = to_rgb(photograph)
        holes = Image.new("L", photograph.size) if mask is None else _white(_open("mask", mask), photograph.size)
    return fit_canvas(photograph, holes, margins, size)


def fit_canvas(photograph: Image.Image, holes: Image.Image, margins: tuple[int, int, int, int], size: int) -> Canvas:
    """`make_canvas` of an RGB or RGBA picture and a grey one of its proportions, white where new content goes."""
    left, right, top, bottom = margins
    room = size - left - right, size - top - bottom
    if min(margins) < 0 or min(room) < 1:
        raise ValueError(f"outpaint must be pixels from 0 that leave room in {size} x {size} px, got {list(margins)}")
    resized = ImageOps.fit(photograph, room, Image.Resampling.LANCZOS).convert("RGB")
    square = to_unit_range(to_tensor(resized)[None])
    # a pixel is new if any part of it is
    hole = to_tensor(ImageOps.fit(holes, room, Image.Resampling.BOX).convert("RGB"))[0] > 0
    if any(margins):
        square, frame = outpaint_canvas(square, margins)
        hole = F.pad(hole, margins) | frame
    if not hole.any():
        raise ValueError(
            "there is nothing to fill: give a mask with white in it, an image with transparency, or outpaint"
        )
    return Canvas(square, hole, f"{_told(photograph, room)}; {hole.float().mean():.0%} of {size} x {size} px are new")


def _told(photograph: Image.Image, room: tuple[int, int]) -> str:
    width, height = photograph.size
    told = f"{width} x {height} px"
    if photograph.size == room:
        return told
    ratio = min(width / room[0], height / room[1])
    return f"{told}, of which the middle {ratio * room[0]:.0f} x {ratio * room[1]:.0f} become {room[0]} x {room[1]}"


def _open(name: str, path: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return upright(file).copy()
    except Exception as error:  # of many kinds, whatever the decoder meets
        raise ValueError(f"{name} {path!r} cannot be read as a picture: {error}") from error


def _white(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Grey picture of a size, 255 where the mask is nearer to white than to black or to nothing."""
    width, height = size
    # in proportion, but for the rounding of its sides
    if abs(mask.width * height - mask.height * width) > (width + height) / 2:
        raise ValueError(
            f"mask must have the image's size or proportions, {width} x {height} px, got {mask.width} x {mask.height}"
        )
    if mask.has_transparency_data:
        coloured = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), coloured)
    return to_rgb(mask).convert("L").point(lambda grey: 255 * (grey >= HALF)).resize(size, Image.Resampling.BOX)
