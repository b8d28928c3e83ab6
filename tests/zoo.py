"""Broken and odd image files of every kind that folders from the web hold, as bytes by name."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run showpage\n%%EOF\n"


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """A whole picture in a format of Pillow."""
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


def cut(content: bytes, part: float = 0.5) -> bytes:
    return content[: int(len(content) * part)]


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes = b"", bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size and holds what it holds."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF of tags (number, type, count, value) and no pixels."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size than its data have."""
    content = bytearray(saved("JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def without(content: bytes, marker: bytes) -> bytes:
    """A JPEG without its first segment of a kind."""
    start = content.index(marker)
    length = struct.unpack(">H", content[start + 2 : start + 4])[0]
    return content[:start] + content[start + 2 + length :]


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(PIXELS, i, axis=1)) for i in range(3)]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:])


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21)


BROKEN = {
    "empty.jpg": b"",
    "one_byte.png": b"\x89",
    "zeros.jpg": bytes(4096),
    "noise.png": np.random.default_rng(1).bytes(4096),
    "text.jpg": b"this is no picture\n" * 20,
    "html.jpg": HTML,
    "json.png": b'{"error": "rate limit exceeded"}',
    "svg.png": SVG,
    "heic.jpg": HEIC,
    "pdf.jpg": b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n",
    "postscript.jpg": POSTSCRIPT,
    "zip.png": b"PK\x03\x04" + bytes(100),
    "cut.jpg": cut(saved("JPEG")),
    "header_only.jpg": saved("JPEG")[:20],
    "no_tables.jpg": without(saved("JPEG"), b"\xff\xdb"),
    "cut_cmyk.jpg": cut(saved("JPEG", Image.fromarray(PIXELS).convert("CMYK"))),
    "cut_progressive.jpg": cut(saved("JPEG", progressive=True), 0.3),
    "cut.png": cut(saved("PNG")),
    "cut_16_bit.png": cut(saved("PNG", sixteen_bit())),
    "cut_palette.png": cut(saved("PNG", Image.fromarray(PIXELS).quantize()), 0.9),
    "wrong_checksum.png": saved("PNG").replace(b"IHDR\0", b"IHDR\1", 1),
    "wrong_magic.png": b"\x88" + saved("PNG")[1:],
    "no_width.png": png(0, 9),
    "no_height.jpg": jpeg_of_size(64, 0),
    "no_pixels.png": png(40, 30),
    "few_pixels.png": png(40, 30, bytes(1000)),
    "bomb.png": png(60_000, 60_000, bytes(1000)),
    "bomb.jpg": jpeg_of_size(65_500, 65_500),
    "bomb.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
    "bomb.tif": tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)),
    "large_claim.png": png(12_000, 12_000),
    "bad_tags.tif": tiff((256, 4, 2**31, 2**31), (257, 2, 7, 3), (258, 99, 1, 8), (273, 4, 2**30, 12)),
    "no_strips.tif": tiff((256, 4, 1, 40), (257, 4, 1, 30), (258, 3, 1, 8), (262, 3, 1, 1)),
    "loop.tif": b"II*\0" + struct.pack("<IH", 8, 0) + struct.pack("<I", 8),
    "cut.tif": cut(saved("TIFF")),
    "cut.gif": saved("GIF")[:40],
    "cut_animation.gif": cut(animation("GIF"), 0.1),
    "cut.webp": cut(saved("WEBP")),
    "cut_animation.webp": cut(animation("WEBP"), 0.1),
    "cut.bmp": cut(saved("BMP")),
    "negative.bmp": b"BM" + struct.pack("<IIIIiiHH", 0, 0, 54, 40, -9, -9, 1, 24) + bytes(24),
    "cut.ppm": cut(saved("PPM")),
    "words.ppm": b"P6\nforty thirty\n255\n" + bytes(3600),
    "strip.png": saved("PNG", Image.new("RGB", (60_000, 1))),
    "no_numbers.tif": saved("TIFF", Image.fromarray(np.full((9, 9), np.nan, np.float32))),
}
"""None of these can be read."""


def exif(content: bytes) -> bytes:
    """A JPEG with such an EXIF segment."""
    whole = saved("JPEG")
    segment = b"Exif\0\0" + content
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]


ODD = {
    "png_named.jpg": saved("PNG"),
    "webp_named.png": saved("WEBP"),
    "one_pixel.png": saved("PNG", Image.new("RGB", (1, 1))),
    "panorama.png": saved("PNG", Image.new("RGB", (500, 10))),
    "broken_profile.jpg": saved("JPEG", icc_profile=b"no profile at all"),
    "cut_profile.png": saved("PNG", icc_profile=PROFILE[:99]),
    "broken_exif.jpg": exif(b"no exif at all"),
    "cut_exif.jpg": exif(b"II*\0" + struct.pack("<IH", 8, 500)),
    "odd_orientation.jpg": exif(tiff((0x0112, 3, 1, 77))),
    "wrong_exif_type.jpg": exif(tiff((0x0112, 2, 9, 1000))),
    "trailing_bytes.jpg": saved("JPEG") + bytes(1000),
    "animation.gif": animation("GIF"),
    "animation.webp": animation("WEBP"),
    "animation.png": animation("PNG"),
    "cmyk.jpg": saved("JPEG", Image.fromarray(PIXELS).convert("CMYK")),
    "progressive.jpg": saved("JPEG", progressive=True),
    "grey_alpha.png": saved("PNG", Image.fromarray(PIXELS).convert("LA")),
    "sixteen_bit.png": saved("PNG", sixteen_bit()),
    "bilevel.tif": saved("TIFF", Image.fromarray(PIXELS).convert("1")),
    "lab.tif": saved("TIFF", Image.new("LAB", (9, 9))),
    "black_float.tif": saved("TIFF", Image.fromarray(np.zeros((9, 9), np.float32))),
    "ünïcode näme.png": saved("PNG"),
}
"""All of these can."""
