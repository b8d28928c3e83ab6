"""Decoding, cropping and scanning, on tiny files of every kind."""

import math
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from fvar_lightning.data import photographs
from fvar_lightning.data.datasets import FolderDataset
from fvar_lightning.data.folders import scan_folder
from fvar_lightning.data.images import ImageTransform, load_image, resize_adm
from fvar_lightning.data.photographs import PHOTOGRAPHS, PhotographDataset
from fvar_lightning.data.sampler import Draw


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resizing and JPEG change little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


# ---- decoding ------------------------------------------------------------------------------------------------------


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    expected = np.rint(values.astype(float) / 257).astype(int)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "c.tif")
    (tmp_path / "d.tif").write_bytes(big_endian_tiff(values))
    for name in ("a.png", "b.tif", "c.tif", "d.tif"):
        image = load_image(tmp_path / name)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(array(image), expected[..., None].repeat(3, axis=-1), err_msg=name)


def big_endian_tiff(values: np.ndarray) -> bytes:
    height, width = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 12 * 8 + 4),
        (278, height),
        (279, values.size * 2),
    ]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"MM" + struct.pack(">HI", 42, 8) + struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    return header + values.astype(">u2").tobytes()


@pytest.mark.parametrize("full", [1.0, 255.0, 65535.0])
def test_float_tiff_is_scaled_by_its_range(tmp_path: Path, full: float) -> None:
    values = np.linspace(-0.1, 1, 1200).reshape(30, 40).astype(np.float32) * full
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.rint(values.clip(min=0).astype(float) / full * 255).astype(int)
    np.testing.assert_array_equal(array(load_image(tmp_path / "a.tif"))[..., 1], expected)


def test_float_tiff_with_nan_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="not finite"):
        load_image(tmp_path / "a.tif")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    colour = array(picture())
    alpha = np.linspace(0, 255, 40).round().astype(int)[None, :].repeat(30, axis=0)
    expected = (colour * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255
    rgba = np.concatenate([colour, alpha[..., None]], axis=-1).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.abs(array(load_image(tmp_path / "rgba.png")) - expected).max() <= 1

    grey = np.stack([colour[..., 0], alpha], axis=-1).astype(np.uint8)
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    assert np.abs(array(load_image(tmp_path / "la.png"))[..., 2] - expected[..., 0]).max() <= 1


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    colours = np.eye(3, dtype=int) * 255
    np.testing.assert_array_equal(array(load_image(tmp_path / "plain.png")), colours[indices])
    colours[1] = 255
    np.testing.assert_array_equal(array(load_image(tmp_path / "clear.png")), colours[indices])


def test_cmyk_grey_and_bilevel_become_rgb(tmp_path: Path) -> None:
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "cmyk.tif")
    expected = [[[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(array(load_image(tmp_path / "cmyk.tif")), expected)
    picture().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(array(load_image(tmp_path / "cmyk.jpg")) - array(picture())).mean() < 6
    grey = picture().convert("L")
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(array(load_image(tmp_path / "grey.png"))[..., 0], array(grey))
    grey.convert("1").save(tmp_path / "bilevel.png")
    assert set(np.unique(array(load_image(tmp_path / "bilevel.png")))) == {0, 255}


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda upright: upright),
        (2, np.fliplr),
        (3, lambda upright: np.rot90(upright, 2)),
        (4, np.flipud),
        (5, lambda upright: np.swapaxes(upright, 0, 1)),
        (6, lambda upright: np.rot90(upright, 1)),  # "rotate by 90 degrees clockwise to see it upright"
        (7, lambda upright: np.swapaxes(np.rot90(upright, 2), 0, 1)),
        (8, lambda upright: np.rot90(upright, -1)),
    ],
)
def test_exif_orientation(tmp_path: Path, orientation: int, stored) -> None:
    upright = array(picture()).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored(upright))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(array(load_image(tmp_path / "a.png")), upright)


def test_a_tag_of_a_wrong_type_does_not_make_a_photograph_unreadable(tmp_path: Path) -> None:
    # big-endian: an orientation of 6, and a resolution that is text where a fraction belongs
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 3, b"72\0\0")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + struct.pack(">I", 0)
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == picture().size[::-1]


# ---- resizing and cropping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (70, 64), (131, 517)])
def test_adm_crop_equals_an_independent_computation(shape: tuple[int, int]) -> None:
    size = 32
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = ImageTransform(size, "adm")(Image.fromarray(pixels), np.random.default_rng(0)).permute(1, 2, 0).numpy()

    height, width = shape
    image = pixels
    while min(height, width) >= 2 * size:
        # A box filter by two is the mean of each two by two block when the side is even
        if height % 2 or width % 2:
            image = np.asarray(Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BOX))
        else:
            blocks = image.astype(int).reshape(height // 2, 2, width // 2, 2, 3)
            # Pillow rounds after each of its two passes, horizontal first
            rows = (blocks.sum(axis=3) + 1) // 2
            image = ((rows.sum(axis=1) + 1) // 2).astype(np.uint8)
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    target = (round(width * scale), round(height * scale))
    image = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    np.testing.assert_array_equal(ours, image[top : top + size, left : left + size])


def test_var_crop_equals_torchvision() -> None:
    reference = v2.Compose([v2.Resize(36, v2.InterpolationMode.LANCZOS), v2.CenterCrop(32), v2.PILToTensor()])
    for shape in ((101, 77), (50, 90), (20, 25)):
        image = picture(*shape)
        assert torch.equal(ImageTransform(32, "var")(image, np.random.default_rng(0)), reference(image))


@pytest.mark.parametrize("resize", ["var", "adm"])
def test_random_crops_and_flips_reach_all_positions_and_obey_their_generator(resize: str) -> None:
    # A picture whose pixels tell their column in red and their row in green
    rows, columns = np.mgrid[:36, :60]
    image = Image.fromarray(np.stack([columns * 4, rows * 4, rows * 0], axis=-1).astype(np.uint8))
    crop = ImageTransform(32, resize, random_crop=True)
    results = [crop(image, np.random.default_rng(i)) for i in range(300)]
    assert torch.equal(results[5], crop(image, np.random.default_rng(5)))
    if resize == "var":  # no scaling: the corner tells the position
        assert {int(r[0, 0, 0]) // 4 for r in results} == set(range(60 - 32 + 1))
        assert {int(r[1, 0, 0]) // 4 for r in results} == set(range(36 - 32 + 1))
    both = ImageTransform(32, resize, random_crop=True, flip=True)
    flipped = [torch.equal(both(image, np.random.default_rng(i)), r.flip(-1)) for i, r in enumerate(results)]
    plain = [torch.equal(both(image, np.random.default_rng(i)), r) for i, r in enumerate(results)]
    assert all(a != b for a, b in zip(flipped, plain, strict=True))
    assert abs(sum(flipped) - 150) < 4 * math.sqrt(300 / 4)


def test_transform_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="resize must be 'var' or 'adm', got 'bicubic'"):
        ImageTransform(32, "bicubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size"):
        ImageTransform(0)


# ---- folders -------------------------------------------------------------------------------------------------------


def fill(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(20, 16, seed * 100 + i).save(folder / f"{i:03d}.png")


def files(images) -> list[str]:
    return [name.decode() for name in images.files]


def test_class_folders_with_held_out_part(tmp_path: Path) -> None:
    fill(tmp_path / "b", 20)
    fill(tmp_path / "a" / "deeper", 5)
    fill(tmp_path / "c", 1)
    (tmp_path / ".hidden").mkdir()
    names, train, val = scan_folder(tmp_path, 0.1)
    assert names == ["a", "b", "c"]
    assert [np.bincount(part.labels, minlength=3).tolist() for part in (train, val)] == [[4, 18, 1], [1, 2, 0]]
    assert not set(files(train)) & set(files(val))
    assert all(file[0] == names[label] for file, label in zip(files(train), train.labels, strict=True))
    again = scan_folder(tmp_path, 0.1)
    assert (files(again[1]), files(again[2])) == (files(train), files(val))
    fill(tmp_path / "d", 3)
    assert set(files(val)) < set(files(scan_folder(tmp_path, 0.1)[2])), "a new class moves no other image"
    assert len(scan_folder(tmp_path, 0)[2].files) == 0


def test_flat_folder_is_one_class_named_after_it(tmp_path: Path) -> None:
    fill(tmp_path / "flowers", 10)
    (tmp_path / "flowers" / "notes.txt").write_text("no image")
    names, train, val = scan_folder(tmp_path / "flowers", 0.2)
    assert names == ["flowers"]
    assert (len(train.files), len(val.files)) == (8, 2)


def test_train_and_val_folders_are_used(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "x", 3)
    fill(tmp_path / "train" / "y", 2)
    fill(tmp_path / "val" / "y", 4)
    names, train, val = scan_folder(tmp_path)
    assert names == ["x", "y"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert val.labels.tolist() == [1, 1, 1, 1]
    data = FolderDataset(val, names, ImageTransform(16))
    assert data.name(0) == str(tmp_path / "val" / "y" / "000.png")


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "train" / "x", 3)
    fill(tmp_path / name / "x", 2)
    fill(tmp_path / "devkit" / "x", 1)
    with pytest.warns(UserWarning, match=r"left out: devkit \(beside train\)"):
        _, train, val = scan_folder(tmp_path)
    assert (len(train.files), len(val.files)) == (3, 2)
    fill(tmp_path / "val" / "x", 1)
    with pytest.raises(ValueError, match=f"must hold one validation folder, got val, {name}"):
        scan_folder(tmp_path)


def test_a_test_folder_is_left_out(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "x", 10)
    fill(tmp_path / "test" / "x", 10)
    with pytest.warns(UserWarning, match=r"left out: test \(beside train\)"):
        _, train, val = scan_folder(tmp_path)
    assert (len(train.files), len(val.files)) == (9, 1)


def test_what_hidden_folders_hold_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "x", 3)
    fill(tmp_path / "x" / ".ipynb_checkpoints", 3)
    assert len(scan_folder(tmp_path, 0)[1].files) == 3


def test_folders_that_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "vehicles" / "bus", 2)
    fill(tmp_path / "vehicles" / "train", 2)
    with pytest.raises(ValueError, match=r"holds a folder train beside bus: .* if it is a class"):
        scan_folder(tmp_path / "vehicles")
    with pytest.raises(ValueError, match="missing' is not a folder"):
        scan_folder(tmp_path / "missing")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty holds no images.*\.jpeg"):
        scan_folder(tmp_path / "empty")
    fill(tmp_path / "split" / "train" / "x", 1)
    fill(tmp_path / "split" / "val" / "x", 1)
    fill(tmp_path / "split" / "val" / "stranger", 1)
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: stranger"):
        scan_folder(tmp_path / "split")
    fill(tmp_path / "mixed", 1)
    fill(tmp_path / "mixed" / "a", 1)
    with pytest.raises(ValueError, match="beside class folders"):
        scan_folder(tmp_path / "mixed")
    fill(tmp_path / "gap" / "a", 1)
    (tmp_path / "gap" / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow"):
        scan_folder(tmp_path / "gap")
    fill(tmp_path / "valonly" / "val" / "a", 1)
    with pytest.raises(ValueError, match="no folder train"):
        scan_folder(tmp_path / "valonly")
    with pytest.raises(ValueError, match=r"val_fraction must lie in \[0, 1\), got 1"):
        scan_folder(tmp_path / "gap", 1)


# ---- broken files --------------------------------------------------------------------------------------------------


def folder_data(folder: Path, **options) -> FolderDataset:
    names, train, _ = scan_folder(folder, 0)
    return FolderDataset(train, names, ImageTransform(16, random_crop=True, flip=True), **options)


def break_files(folder: Path) -> list[Path]:
    """An image cut off, one of zeros, one empty, one whose bytes are scrambled."""
    picture(200, 200).save(folder / "001.jpg")
    (folder / "001.jpg").write_bytes((folder / "001.jpg").read_bytes()[:2000])
    (folder / "003.png").write_bytes(bytes(500))
    (folder / "004.png").write_bytes(b"")
    content = bytearray((folder / "006.png").read_bytes())
    content[40:] = content[40:][::-1]
    (folder / "006.png").write_bytes(bytes(content))
    return [folder / name for name in ("001.jpg", "003.png", "004.png", "006.png")]


def test_unreadable_images_are_reported_once_and_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "a", 9)
    broken = break_files(tmp_path / "a")
    data = folder_data(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = [data[Draw(0, i)] for i in range(len(data))]
        again = [data[Draw(0, i)] for i in range(len(data))]
    messages = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    assert len(messages) == len(broken)
    assert all(sum(str(path) in message for message in messages) == 1 for path in broken)
    assert data.num_unreadable == len(broken)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    # Whoever comes first to a broken image gets the same replacement
    backwards = folder_data(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in reversed(range(len(data))):
            assert torch.equal(backwards[Draw(0, i)][0], first[i][0])


def test_workers_tell_the_main_process(tmp_path: Path) -> None:
    fill(tmp_path / "a", 9)
    broken = break_files(tmp_path / "a")
    data = folder_data(tmp_path)
    loader = DataLoader(data, batch_size=2, num_workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(loader)
    assert sum(len(images) for images, _ in batches) == len(data) == 10
    assert data.num_unreadable == len(broken)
    assert all(str(path) in data.report() for path in broken)
    assert data.report().startswith("4 of 10 images")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_unreadable_images_end_it(tmp_path: Path, num_workers: int) -> None:
    fill(tmp_path / "a", 9)
    break_files(tmp_path / "a")
    data = folder_data(tmp_path, max_unreadable=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"too many unreadable images \(max_unreadable is 2\): 3 of 10"):
            list(DataLoader(data, num_workers=num_workers))


def test_nothing_readable_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"?")
    data = folder_data(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="none of the 3 images"):
            data[0]


def test_allowance_is_one_percent_but_at_least_ten(tmp_path: Path) -> None:
    fill(tmp_path / "a", 2)
    assert folder_data(tmp_path).max_unreadable == 10
    names, train, _ = scan_folder(tmp_path, 0)
    many = train._replace(files=train.files.repeat(1000), labels=train.labels.repeat(1000))
    assert FolderDataset(many, names, ImageTransform(16)).max_unreadable == 20


def test_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    fill(tmp_path / "a", 6)
    data = folder_data(tmp_path)
    draws = [Draw(epoch, i) for epoch in range(3) for i in range(6)]
    first = {draw: data[draw][0] for draw in draws}
    other = folder_data(tmp_path)
    assert all(torch.equal(other[draw][0], first[draw]) for draw in reversed(draws))
    assert torch.equal(data[4][0], first[Draw(0, 4)])
    assert any(not torch.equal(first[Draw(0, i)], first[Draw(1, i)]) for i in range(6))
    reseeded = folder_data(tmp_path, seed=1)
    assert any(not torch.equal(reseeded[draw][0], first[draw]) for draw in draws)
    with pytest.raises(IndexError):
        data[6]


# ---- photographs ---------------------------------------------------------------------------------------------------


def test_photograph_crops() -> None:
    pytest.importorskip("skimage")
    data = PhotographDataset(64, 3, flip=True)
    assert len(data) == 3 * len(PHOTOGRAPHS)
    samples = [data[i] for i in range(len(data))]
    assert all(image.shape == (3, 64, 64) and image.dtype == torch.uint8 for image, _ in samples)
    assert [label for _, label in samples] == list(range(len(PHOTOGRAPHS))) * 3
    assert not torch.equal(samples[0][0], samples[len(PHOTOGRAPHS)][0])
    assert torch.equal(data[Draw(2, 5)][0], PhotographDataset(64, 3, flip=True)[Draw(2, 5)][0])
    assert not torch.equal(data[Draw(2, 5)][0], data[Draw(3, 5)][0])
    val = PhotographDataset(64, 3, validation=True)
    assert torch.equal(val[Draw(0, 5)][0], val[Draw(3, 5)][0])
    assert not torch.equal(val[5][0], PhotographDataset(64, 3)[5][0])
    with pytest.raises(IndexError):
        data[len(data)]


def test_photograph_crops_reach_from_half_to_all_of_the_shorter_side(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red tells the column and green the row, so that the colours of a crop tell where it was
    rows, columns = np.mgrid[:200, :250]
    ramp = Image.fromarray(np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8))
    monkeypatch.setattr(photographs, "_reduced", lambda name, size: ramp)
    data = PhotographDataset(50, 40)
    crops = torch.stack([data[i][0] for i in range(len(data))]).double()
    # The centres of the first and last of 50 pixels are 49/50 of the crop apart
    sides = (crops[:, :2, -1, -1] - crops[:, :2, 0, 0]) * 50 / 49
    assert (sides[:, 0] - sides[:, 1]).abs().max() < 3, "square"
    assert 98 <= sides.min() < 103
    assert 197 < sides.max() <= 203
    assert crops[:, 0].min() < 4
    assert crops[:, 0].max() > 245
    assert crops[:, 1].max() > 195
    larger = PhotographDataset(150, 1)
    sides = torch.stack([larger[i][0] for i in range(len(larger))]).double()[:, 1]
    assert (sides[:, -1, 0] - sides[:, 0, 0]).min() > 147, "nothing is enlarged that need not be"
    assert PhotographDataset(400, 1)[0][0].shape == (3, 400, 400)


def test_missing_scikit_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"fvar-lightning\[demo\]"):
        PhotographDataset(32, 1)


def test_adm_resize_never_halves_below_the_side() -> None:
    assert resize_adm(picture(127, 64), 32).size == (63, 32)
    assert resize_adm(picture(126, 63), 32).size == (64, 32)
