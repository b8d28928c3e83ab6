"""Pictures of what the parts do: tiles of images, focus pyramids, charts of figures."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.optics.refocus import Views

INK, PAPER = (32, 32, 36), (255, 255, 255)
Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


def to_image(image: Tensor, side: int) -> Image.Image:
    """(3, h, w) in [-1, 1] as a picture of `side` pixels, enlarged without smoothing."""
    pixels = F.interpolate(image.detach()[None].float().cpu(), size=(side, side), mode="nearest-exact")[0]
    return Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy())


def tile(
    rows: Sequence[Sequence[Tensor]], names: Sequence[str], heads: Sequence[str] = (), side: int = 96
) -> Image.Image:
    """Rows of images, each (3, h, w) in [-1, 1], with the rows' names at the left and heads above the columns."""
    font = ImageFont.load_default(13)
    left = 12 + max((int(font.getlength(name)) for name in names), default=0)
    top = 22 if heads else 4
    gap = 4
    width = left + max(len(row) for row in rows) * (side + gap)
    sheet = Image.new("RGB", (width, top + len(rows) * (side + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        while font.getlength(head) > side and len(head) > 1:
            head = head.rstrip("…")[:-1] + "…"
        draw.text((left + x * (side + gap) + side / 2, 4), head, INK, font, anchor="mt")
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        draw.text((6, top + y * (side + gap) + side / 2), name, INK, font, anchor="lm")
        for x, image in enumerate(row):
            sheet.paste(to_image(image, side), (left + x * (side + gap), top + y * (side + gap)))
    return sheet


def pyramid(views: Views, radii: Sequence[float], index: int = 0, gain: float = 2.0, side: int = 144) -> Image.Image:
    """The three views of one image at every scale; residuals are amplified by `gain` around grey."""
    rows = [
        [d[index] for d in views.downsampled],
        [f[index] for f in views.focused],
        [gain * a[index] for a in views.alias],
    ]
    heads = [f"{f.shape[-1]} px, radius {r:.3g}" for f, r in zip(views.focused, radii, strict=True)]
    return tile(rows, ["downsampled D", "focused L", f"alias A x {gain:g}"], heads, side)


def bar_chart(values: Mapping[str, float], title: str) -> Image.Image:
    """One bar for each name, of values in [0, 1]; none for NaN, which there is of what was not seen.

    Raises:
        ValueError: without values.
    """
    if not values:
        raise ValueError("values must not be empty")
    figure = Figure(figsize=(5.6, 3), layout="constrained")
    axis = _axis(figure, title)
    shown = np.array(list(values.values()))
    bars = axis.bar(list(values), np.nan_to_num(shown))
    axis.bar_label(bars, ["" if math.isnan(value) else f"{value:.2f}" for value in shown], fontsize=8)
    axis.set_ylim(0, 1)
    return _picture(figure)


def line_chart(panels: Mapping[str, Mapping[str, Curve]], xlabel: str) -> Image.Image:
    """A panel for every title, a curve for every name in it.

    Args:
        panels: points (x, y) by name of the curve, by title.
        xlabel: what x is.

    Raises:
        ValueError: without panels.
    """
    if not panels:
        raise ValueError("panels must not be empty")
    figure = Figure(figsize=(max(4.2 * len(panels), 5.6), 3.2), layout="constrained")
    for i, (title, curves) in enumerate(panels.items()):
        axis = _axis(figure, title, (1, len(panels), i + 1))
        for name, points in curves.items():
            marker = "." if len(points) == 1 else ""
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker=marker)
        axis.set_xlabel(xlabel)
        if curves:
            axis.legend(fontsize=8)
    return _picture(figure)


def _axis(figure: Figure, title: str, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    axis = figure.add_subplot(*place)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def _picture(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")
