"""What the buttons of the demo do, without its page: a visitor's wishes in, pictures out.

A ValueError is meant for the visitor: no message names a file of the machine it runs on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from fvar_lightning.commands.canvas import HALF, fit_canvas
from fvar_lightning.commands.classes import spelled
from fvar_lightning.commands.edit import command_again
from fvar_lightning.commands.generate import about_one
from fvar_lightning.commands.images import about
from fvar_lightning.commands.model import ReadyModel, SamplingOptions
from fvar_lightning.data.images import load_image, to_tensor
from fvar_lightning.data.pixels import to_unit_range
from fvar_lightning.generation.editing import edit
from fvar_lightning.generation.focus import refocused
from fvar_lightning.generation.sampling import Progress, sample
from fvar_lightning.metrics.pictures import pyramid, tile, to_image
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule

LARGEST_PIXELS = 50_000_000
"""Of an uploaded picture: 200 MB while it is decoded."""
KEPT_SIDE = 1024
"""Longer side of what is kept of it for its visitor."""
PAINTED_SIDE = 512
"""What is painted on is enlarged to about this side."""
STRIP_SIDE = 128
LARGEST_SEED = 2**63 - 1
NO_PHOTOGRAPH = "upload a photograph first, or take the generated image"


class Generation(NamedTuple):
    """What is kept of an image for its visitor: enough to show it at any focus without sampling anew."""

    model: str
    """Its name on the page."""
    label: int
    seed: int
    settings: dict[str, Any]
    """The model's and the sampling's."""
    stages: list[Tensor]
    """f_hat after every scale: S tensors (1, Z, h, w) on the CPU."""


def sample_image(
    ready: ReadyModel, name: str, label: int | None, seed: int | None, sampling: SamplingOptions, progress: Progress
) -> Generation:
    """Sample an image of a class.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """
    drawing = sampling.over(ready.info.sampling)
    seed = _check_seed(seed)
    labels = torch.tensor([_check_label(ready, label)], device=ready.device)
    stages = sample(ready.var, ready.vae, labels, seeds=[seed], **drawing)
    kept = [f_hat.cpu() for f_hat in progress(stages)]
    return Generation(name, int(labels), seed, ready.settings | drawing, kept)


@torch.no_grad()
def focused(ready: ReadyModel, made: Generation, focus: float) -> Image.Image:
    """The image at a focus radius in pixels, with the settings and the command that makes it again as its texts.

    Raises:
        ValueError: if the radius is not in 0..the schedule's largest.
    """
    f_hat = refocused((stage.to(ready.device) for stage in made.stages), ready.vae.schedule, focus)
    texts = about_one(ready, made.label, made.settings | {"focus": float(focus), "seed": made.seed})
    return _picture(ready.vae.image(f_hat)[0], texts)


@torch.no_grad()
def strip(ready: ReadyModel, made: Generation) -> Image.Image:
    """The image after every scale, side by side."""
    schedule = ready.vae.schedule
    images = [ready.vae.image(f_hat.to(ready.device))[0] for f_hat in made.stages]
    heads = [f"{n} x {n}, {radius:.3g} px" for n, radius in zip(schedule.patch_nums, schedule.radii, strict=True)]
    return tile([images], [""], heads, STRIP_SIDE)


def read_photograph(path: str) -> Image.Image:
    """An uploaded file as RGB, upright, its longer side at most `KEPT_SIDE`.

    Raises:
        ValueError: if it is no picture, or a very large one.
    """
    try:
        with Image.open(path) as file:  # reads its head alone
            width, height = file.size
        if width * height <= LARGEST_PIXELS:
            picture = load_image(path)
            picture.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
            return picture
    except Exception as error:  # of many kinds, whatever the decoder meets
        raise ValueError(
            "the file cannot be read as a picture: it is broken, very large, very long, or of another kind than PNG, "
            "JPEG, WebP, TIFF, GIF or BMP"
        ) from error
    raise ValueError(
        f"the picture measures {width} x {height} px: up to {LARGEST_PIXELS / 1e6:.0f} megapixels are accepted"
    )


def middle(picture: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle of a picture, resized."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def to_paint_on(square: Image.Image) -> Image.Image:
    """A square of the model's size, enlarged by a whole number without smoothing: a brush finds its pixels."""
    side = square.width * max(PAINTED_SIDE // square.width, 1)
    return square.resize((side, side), Image.Resampling.NEAREST)


def painted(layers: Sequence[Image.Image]) -> Image.Image:
    """White where a brush left something on any of the layers, RGBA of equal size; black elsewhere.

    Raises:
        ValueError: without layers.
    """
    if not layers:
        raise ValueError("there is nothing to fill: paint over what is to be replaced")
    mask = Image.new("L", layers[0].size)
    for layer in layers:
        mask = ImageChops.lighter(mask, layer.getchannel("A"))
    return mask.point(lambda alpha: 255 * (alpha >= HALF))


def mask_of(painted_mask: Image.Image, size: int) -> Image.Image:
    """A painted mask at the model's size: white in every pixel that it touches."""
    touched = painted_mask.resize((size, size), Image.Resampling.BOX)
    return touched.point(lambda grey: 255 * (grey > 0))


def fill(
    ready: ReadyModel,
    picture: Image.Image | None,
    mask: Image.Image | None,
    margins: tuple[int, int, int, int],
    label: int | None,
    seed: int | None,
    sampling: SamplingOptions,
    progress: Progress,
) -> Image.Image:
    """A picture with new content where a mask is white, or around it; with its settings as texts.

    Args:
        ready: the model.
        picture: RGB, of any size.
        mask: grey, of its proportions; None: all of the picture is kept.
        margins: pixels of new content on the left, right, top and bottom.
        label: class of the new content; None: none.
        seed, sampling, progress: as of `sample_image`.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """
    if picture is None:
        raise ValueError(NO_PHOTOGRAPH)
    holes = Image.new("L", picture.size) if mask is None else mask
    canvas = fit_canvas(picture, holes, margins, ready.vae.schedule.image_size)
    free = ready.var.num_classes
    drawing = sampling.over(ready.info.sampling)
    settings = ready.settings | drawing | {"seed": _check_seed(seed)}
    made = edit(
        ready.var,
        ready.vae,
        canvas.image.to(ready.device),
        canvas.hole.to(ready.device),
        torch.tensor([free if label is None else _check_label(ready, label)], device=ready.device),
        seeds=[settings["seed"]],
        progress=progress,
        **drawing,
    )
    name = None if label is None else spelled(label, ready.info.class_names)
    files = {"image": "photograph.png", "mask": None if mask is None else "mask.png"}
    texts = {"class": name, "weights_sha256": ready.weights_sha256, **settings}
    return _picture(made[0], about(texts, command_again(name, margins if any(margins) else (0,), files | settings)))


def focus_pyramid(picture: Image.Image | None, schedule: FocusSchedule, psf: str, gain: float) -> Image.Image:
    """What a schedule's optics make of the middle of a picture: the three views at every scale.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """
    if picture is None:
        raise ValueError(NO_PHOTOGRAPH)
    square = to_unit_range(to_tensor(middle(picture, schedule.image_size))[None])
    return pyramid(Refocus(schedule, psf)(square), schedule.radii, gain=gain)


def _picture(image: Tensor, texts: dict[str, str]) -> Image.Image:
    """(3, H, W) in [-1, 1] with texts, which a PNG keeps."""
    picture = to_image(image, image.shape[-1])
    picture.info.update(texts)
    return picture


def _check_label(ready: ReadyModel, label: int | None) -> int:
    if label is None or not 0 <= label < ready.var.num_classes:
        raise ValueError(f"class must be one of the model's {ready.var.num_classes}, got {label}")
    return label


def _check_seed(seed: int | None) -> int:
    if seed is None or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {seed}")
    return int(seed)
