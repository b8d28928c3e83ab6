"""Legibility of small text: words rendered, reconstructed by a tokenizer, and read back by an OCR program."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.text import CharErrorRate

from fvar_lightning.data.pixels import to_uint8

Reader = Callable[[np.ndarray], str]
"""Reads one word from a uint8 image (H, W, 3)."""

SIZES = (6, 8, 10, 12, 16, 20, 24, 32)
WORDS = ("Focus", "grain", "mirror", "Kq7Rx", "waltz", "84031", "jumbo", "Hypno", "vexed", "25916", "bright", "Zebra")
"""Words and strings of characters that no dictionary completes."""

READING_HEIGHT = 48
"""Pixels to which a line is enlarged before it is read: what recognition networks are trained at."""


def rapid_ocr() -> Reader:
    """A reader from the package rapidocr-onnxruntime, which brings its networks along.

    Raises:
        ImportError: saying what to install.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ImportError("reading text needs the extra `ocr`: pip install 'fvar-lightning[ocr]'") from error
    engine = RapidOCR()

    def read(image: np.ndarray) -> str:
        lines, _ = engine(np.ascontiguousarray(image), use_det=False, use_cls=False, use_rec=True)
        return "".join(line[0] for line in lines or [])

    return read


def render_words(
    words: Sequence[str], size: int, image_size: int
) -> tuple[Tensor, list[tuple[str, tuple[int, int, int, int]]]]:
    """A page of words, black on white, each followed by the next until the page is full.

    Args:
        words: taken in turn, as often as they fit.
        size: of the font, in pixels.
        image_size: side of the page.

    Returns:
        The page (1, 3, N, N) in [-1, 1], and every word with its box (left, top, right, bottom).

    Raises:
        ValueError: where not one word fits.
    """
    page = Image.new("RGB", (image_size, image_size), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    gap, line = math.ceil(size / 2), math.ceil(1.5 * size)
    boxes: list[tuple[str, tuple[int, int, int, int]]] = []
    left, top = gap, gap
    for word in (words[i % len(words)] for i in range(image_size**2)):
        width = math.ceil(font.getlength(word))
        if left + width + gap > image_size:
            left, top = gap, top + line + gap
        if top + line > image_size or left + width + gap > image_size:
            break
        draw.text((left, top), word, fill="black", font=font)
        boxes.append((word, (left - gap // 2, top - gap // 2, left + width + gap // 2, top + line)))
        left += width + 2 * gap
    if not boxes:
        raise ValueError(f"size must let a word fit into {image_size} px, got {size}")
    pixels = torch.from_numpy(np.asarray(page).copy()).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1, boxes


def text_legibility(
    reconstruct: Callable[[Tensor], Tensor],
    read: Reader,
    image_size: int = 256,
    sizes: Sequence[int] = SIZES,
    words: Sequence[str] = WORDS,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Character error rate of words read from reconstructed pages, one page for every font size.

    Args:
        reconstruct: images (1, 3, N, N) in [-1, 1] to images of the same size; the identity gives the reader's own
            errors, below which no reconstruction comes.
        read: such as `rapid_ocr()`.
        image_size: N.
        sizes: of the font, in pixels.
        words: see `render_words`.
        device: where `reconstruct` is called.

    Returns:
        ``cer_<size>`` for every size, 0 to 1 and above where more is read than is there (torchmetrics'
        CharErrorRate), and their mean ``cer``: a page of small words holds more of them, and must not count for more.
    """
    values = {}
    for size in sizes:
        page, boxes = render_words(words, size, image_size)
        with torch.no_grad():
            pixels = to_uint8(reconstruct(page.to(device)))[0].permute(1, 2, 0).cpu().numpy()
        texts = [read(_enlarged(pixels[top:bottom, left:right])) for _, (left, top, right, bottom) in boxes]
        rate = CharErrorRate()
        rate.update(texts, [word for word, _ in boxes])
        values[f"cer_{size}"] = float(rate.compute())
    return values | {"cer": sum(values.values()) / len(values)}


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    if height >= READING_HEIGHT:
        return pixels
    size = (round(width * READING_HEIGHT / height), READING_HEIGHT)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
