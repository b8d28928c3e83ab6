"""Every kind of broken file is skipped, counted and named; what is only odd is read."""

import io
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fvar_lightning.data.datasets import FolderDataset, ImageDataset
from fvar_lightning.data.folders import scan_folder
from fvar_lightning.data.hf import HFDataset, HFOptions, load_hf
from fvar_lightning.data.images import EXTENSIONS, ImageTransform, load_image
from zoo import BROKEN, ODD, PIXELS

TRANSFORM = ImageTransform(16, random_crop=True, flip=True)


def read_all(data: ImageDataset) -> list[str]:
    """Every sample once; what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(len(data)):
            image, label = data[i]
            assert image.shape == (3, 16, 16)
            assert label == 0
    return [str(w.message) for w in caught if str(w.message).startswith("unreadable")]


def test_broken_files_are_skipped_counted_and_named_without_filling_the_memory(tmp_path: Path) -> None:
    for name, content in {**BROKEN, "good.png": ODD["one_pixel.png"]}.items():
        (tmp_path / name).write_bytes(content)
    names, train, _ = scan_folder(tmp_path, 0)
    data = FolderDataset(train, names, TRANSFORM, max_unreadable=len(BROKEN))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages = read_all(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 300e6
    assert len(BROKEN) >= 20
    assert data.num_unreadable == len(messages) == len(BROKEN)
    for name in BROKEN:
        assert sum(f"{tmp_path / name} replaced" in message for message in messages) == 1
    assert data.report().startswith(f"{len(BROKEN)} of {len(BROKEN) + 1} images: {tmp_path}")


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")
def test_what_is_only_odd_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ODD[name])
    image = load_image(tmp_path / name)
    assert image.mode == "RGB"
    with Image.open(io.BytesIO(ODD[name])) as stored:
        assert image.size == stored.size
    assert TRANSFORM(image, np.random.default_rng(0)).dtype == torch.uint8
    if image.size == (64, 48) and name not in ("grey_alpha.png", "sixteen_bit.png", "bilevel.tif"):
        difference = np.abs(np.asarray(image, dtype=int) - PIXELS)
        assert difference.mean() < (1 if name.endswith(".png") and "webp" not in name else 50), "the right picture"


def test_the_same_in_rows_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [
        {"bytes": content, "path": name} for name, content in {"good.png": ODD["animation.png"], **BROKEN}.items()
    ]
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    datasets.disable_progress_bars()
    rows.save_to_disk(str(tmp_path / "zoo"))
    names, part, _ = load_hf(str(tmp_path / "zoo"), HFOptions())
    data = HFDataset(part, names, TRANSFORM, np.arange(len(images)), max_unreadable=len(BROKEN))
    messages = read_all(data)
    assert data.num_unreadable == len(messages) == len(BROKEN)
    for row in range(1, len(images)):
        assert sum(f"train[{row}] replaced" in message for message in messages) == 1


def test_no_file_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object, **options: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("subprocess.check_call", start)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    path = tmp_path / "page.png"
    path.write_bytes(BROKEN["postscript.jpg"])
    with pytest.raises(AssertionError, match="Ghostscript"), Image.open(path) as file:
        file.load()
    with pytest.raises(OSError, match="cannot identify"):
        load_image(path)


def test_extensions_and_formats_belong_together() -> None:
    assert all(name.endswith(EXTENSIONS) for name in {**BROKEN, **ODD})
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "cut files would be half grey"
