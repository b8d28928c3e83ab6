"""Charts and what is read from them, against closed forms; legibility with readers of known ability."""

import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fvar_lightning.metrics.charts import (
    edge_mtf,
    fine_text,
    moire_energy,
    mtf50,
    siemens_star,
    slanted_edge,
    zone_plate,
)
from fvar_lightning.metrics.legibility import rapid_ocr, render_words, text_legibility


@pytest.mark.parametrize("chart", [zone_plate, siemens_star, slanted_edge, fine_text])
def test_charts_are_grey_images_in_range(chart):
    image = chart(97)
    assert image.shape == (1, 3, 97, 97)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    assert image.std() > 0.2
    assert torch.equal(image[:, 0], image[:, 2])
    with pytest.raises(ValueError, match="size must be at least 16"):
        chart(9)


def test_zone_plate_has_its_local_frequency():
    # phase of the chart's middle row, in a window around x: the Fourier peak lies at f_max x / R
    row = zone_plate(1024, max_frequency=0.4)[0, 0, 512].double().numpy()
    for x in (100, 250, 400):
        part = row[512 + x - 16 : 512 + x + 16] * np.hanning(32)
        spectrum = np.abs(np.fft.rfft(part, 4096))
        assert np.argmax(spectrum) / 4096 == pytest.approx(0.4 * x / 512, abs=0.006)


def test_siemens_star_repeats_with_its_spokes():
    star = siemens_star(256, spokes=12)[0, 0]
    # a quarter turn is three periods of twelve
    torch.testing.assert_close(star, star.rot90(), atol=1e-5, rtol=0)
    ring = torch.tensor(
        [
            star[round(127.5 + 80 * math.sin(a)), round(127.5 + 80 * math.cos(a))]
            for a in torch.arange(0, 2 * math.pi, 0.001)
        ]
    )
    assert int(((ring[1:] > 0) != (ring[:-1] > 0)).sum()) == 24
    assert star[127, 127] == 0


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.2, 2.0])
@pytest.mark.parametrize("angle", [5.0, -7.0])
def test_mtf_of_a_gaussian_edge(sigma, angle):
    edge = slanted_edge(128, angle, sigma)
    # exp(-2 (pi sigma f)^2) = 1/2
    assert mtf50(edge) == pytest.approx(math.sqrt(math.log(2) / 2) / (math.pi * sigma), rel=0.01)
    assert mtf50(-edge) == pytest.approx(mtf50(edge), rel=1e-6)
    frequency, transfer = edge_mtf(edge)
    expected = torch.exp(-2 * (math.pi * sigma * frequency) ** 2)
    torch.testing.assert_close(transfer, expected, atol=0.015, rtol=0)


def test_mtf_of_a_box_blur():
    edge = slanted_edge(160, 5, 0.4)
    blurred = F.avg_pool2d(edge, (1, 5), stride=1)
    frequency, before = edge_mtf(edge)
    at, after = edge_mtf(blurred)
    # the mean of 5 pixels across: a Dirichlet kernel of the frequency's horizontal part
    f = at[at < 0.35] * math.cos(math.radians(5))
    expected = (torch.sin(5 * math.pi * f) / (5 * torch.sin(math.pi * f))).abs()
    expected[0] = 1
    ratio = after[at < 0.35] / torch.from_numpy(np.interp(at[at < 0.35], frequency, before))
    torch.testing.assert_close(ratio, expected, atol=0.03, rtol=0)


def test_mtf_needs_an_edge():
    with pytest.raises(ValueError, match="one nearly vertical edge"):
        mtf50(torch.zeros(1, 3, 64, 64))
    upright = torch.linspace(-1, 1, 64).sign().expand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="slanted enough"):
        mtf50(upright)
    with pytest.raises(ValueError, match=r"angle must be nonzero.*got 0"):
        slanted_edge(64, 0)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_moire_of_filters(factor):
    size = 512
    chart = zone_plate(size)
    plain = chart[..., factor // 2 :: factor, factor // 2 :: factor]
    assert float(moire_energy(plain, size, factor)) == pytest.approx(0, abs=0.1)
    # stationary phase: a filter shows the chart with its gain at the local frequency
    c = (np.arange(size) + 0.5 - size / 2) / size
    fy, fx = c[:, None], c[None, :]
    f = np.hypot(fy, fx)
    region = (f > 1.25 / (2 * factor)) & (f <= 0.5)

    def mean(g):
        return np.sin(np.pi * g * factor) / (factor * np.sin(np.pi * g))

    gain = ((mean(fx) * mean(fy)) ** 2)[region].mean()
    area = F.avg_pool2d(chart, factor)
    assert float(moire_energy(area, size, factor)) == pytest.approx(10 * math.log10(gain), abs=0.5)


def test_moire_at_full_size():
    chart = zone_plate(256)

    def enlarge(x):
        return F.interpolate(x, (256, 256), mode="bicubic")

    aliased = float(moire_energy(enlarge(chart[..., 2::4, 2::4]), 256, 4))
    untouched = float(moire_energy(chart, 256, 4))
    assert aliased > -2
    assert untouched < -20
    assert float(moire_energy(torch.zeros(1, 3, 64, 64), 256, 4)) == -math.inf
    with pytest.raises(ValueError, match=r"factor must be above 1\.25"):
        moire_energy(chart, 256, 1.2)


def test_pages_hold_their_words():
    page, boxes = render_words(["alpha", "be"], 12, 128)
    assert page.shape == (1, 3, 128, 128)
    assert [word for word, _ in boxes[:3]] == ["alpha", "be", "alpha"]
    ink = page[0, 0] < 0
    inside = torch.zeros_like(ink)
    for _, (left, top, right, bottom) in boxes:
        assert ink[top:bottom, left:right].any()
        assert not inside[top:bottom, left:right].any()  # boxes do not overlap
        inside[top:bottom, left:right] = True
    assert not (ink & ~inside).any()
    with pytest.raises(ValueError, match="got 200"):
        render_words(["alpha"], 200, 128)


def test_character_error_rates():
    words = ["abcd", "efghij"]

    class Perfect:
        """Knows the pages and gives the words in their order."""

        def __init__(self):
            self.texts = iter([w for size in (12, 16) for w, _ in render_words(words, size, 128)[1]])

        def __call__(self, image):
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
            return next(self.texts)

    assert text_legibility(lambda x: x, Perfect(), 128, (12, 16), words) == {"cer_12": 0, "cer_16": 0, "cer": 0}
    blind = text_legibility(lambda x: x, lambda image: "", 128, (12,), words)
    assert blind["cer_12"] == blind["cer"] == 1
    # what is read is what was reconstructed: a reader of ink finds none on a page turned white
    reader = Perfect()

    def ink(image):
        text = next(reader.texts)
        return text if image.min() < 128 else ""

    assert text_legibility(torch.ones_like, ink, 128, (12,), words)["cer"] == 1


def test_missing_ocr_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r"fvar-lightning\[ocr\]"):
        rapid_ocr()


def test_rapid_ocr_reads_large_words_better_than_small_ones():
    pytest.importorskip("rapidocr_onnxruntime")
    rates = text_legibility(lambda x: x, rapid_ocr(), 192, (20,), ("Focus", "mirror", "84031"))
    assert rates["cer"] < 0.1
    blurred = text_legibility(lambda x: F.avg_pool2d(x, 15, 1, 7), rapid_ocr(), 192, (20,), ("Focus", "mirror"))
    assert blurred["cer"] > 0.5
