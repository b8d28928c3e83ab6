"""Pictures of what the parts do: tiles of images, focus pyramids, loss curves. Needs nothing but Pillow to tile."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.optics.refocus import Views

INK, PAPER = (32, 32, 36), (255, 255, 255)


def to_image(image: Tensor, side: int) -> Image.Image:
    """(3, h, w) in [-1, 1] as a picture of `side` pixels, enlarged without smoothing."""
    pixels = image.detach().float().cpu().clamp(-1, 1)[None]
    pixels = F.interpolate(pixels, size=(side, side), mode="nearest-exact")[0]
    pixels = pixels.add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


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


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All figures that CSV loggers wrote below a folder: name -> (step, value), a resumed run's parts joined."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and "/" in name:
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot_losses(panels: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """A panel for every run, a curve for every name in it; needs matplotlib (demo extra)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        if curves:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
