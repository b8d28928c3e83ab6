"""Plots that need nothing but Pillow: bars of shares, curves of power spectra."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = (32, 32, 36), (222, 222, 226), (255, 255, 255)
COLORS = ((31, 119, 180), (214, 96, 40), (44, 140, 70), (130, 90, 170))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 52, 12, 30, 36


def _sheet(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    draw.text((LEFT, 8), title, INK, font)
    return sheet, draw, font


def _ticks(draw: ImageDraw.ImageDraw, font: object, low: float, high: float) -> None:
    for i in range(5):
        value = low + (high - low) * i / 4
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * i / 4
        draw.line((LEFT, y, WIDTH - RIGHT, y), FAINT)
        draw.text((LEFT - 6, y), f"{value:.3g}", INK, font, anchor="rm")  # type: ignore[arg-type]


def bar_chart(values: Mapping[str, float], title: str) -> Image.Image:
    """One bar for each name, of values in [0, 1]; none for NaN, which there is of what was not seen.

    Raises:
        ValueError: without values.
    """
    if not values:
        raise ValueError("values must not be empty")
    sheet, draw, font = _sheet(title)
    _ticks(draw, font, 0.0, 1.0)
    step = (WIDTH - LEFT - RIGHT) / len(values)
    bottom = HEIGHT - BOTTOM
    for i, (name, value) in enumerate(values.items()):
        x = LEFT + i * step
        top = bottom - (bottom - TOP) * (0.0 if math.isnan(value) else min(max(value, 0.0), 1.0))
        draw.rectangle((x + 0.15 * step, top, x + 0.85 * step, bottom), COLORS[0])
        draw.text((x + step / 2, bottom + 6), name, INK, font, anchor="mt")
        draw.text((x + step / 2, top - 3), f"{value:.2f}", INK, font, anchor="mb")
    return sheet


def line_chart(curves: Mapping[str, Sequence[float]], title: str, ends: tuple[str, str]) -> Image.Image:
    """Curves of equally spaced values over a common axis.

    Args:
        curves: by name, two values or more each.
        title: above the plot, says what the values are.
        ends: what the axis says at its left and right end.

    Raises:
        ValueError: without curves, or for one with fewer than two values.
    """
    if not curves or any(len(values) < 2 for values in curves.values()):
        raise ValueError(f"curves must hold two values or more each, got { ({n: len(v) for n, v in curves.items()}) }")
    sheet, draw, font = _sheet(title)
    everything = [value for values in curves.values() for value in values]
    low, high = min(everything), max(everything)
    high = high if high > low else low + 1
    _ticks(draw, font, low, high)
    for i, (name, values) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        points = [
            (
                LEFT + (WIDTH - LEFT - RIGHT) * j / (len(values) - 1),
                HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low),
            )
            for j, value in enumerate(values)
        ]
        draw.line(points, color, 2)
        draw.text((WIDTH - RIGHT - 6, TOP + 4 + 15 * i), name, color, font, anchor="rt")
    draw.text((LEFT, HEIGHT - BOTTOM + 8), ends[0], INK, font)
    draw.text((WIDTH - RIGHT, HEIGHT - BOTTOM + 8), ends[1], INK, font, anchor="rt")
    return sheet
