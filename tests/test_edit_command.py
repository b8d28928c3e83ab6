"""`fvar edit` as a user meets it: what becomes of pictures and masks of any kind, what is kept, what is refused."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fvar_lightning.__main__ import run
from fvar_lightning.commands.canvas import make_canvas
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.generation.editing import edit
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.weights.pretrained import save_pretrained
from test_checkpoints import NAMES, SAMPLING, tiny_vae, tiny_var
from test_generate_command import pixels, texts

SIDE = 12
NONE = (0, 0, 0, 0)


def edit_vae() -> VQVAE:
    """torch refuses to normalise a group of one value, and one picture's smallest view is a pixel of features."""
    return tiny_vae(norm_groups=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, tiny_var(), edit_vae(), class_names=NAMES, sampling=SAMPLING)
    return folder


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """255 from left, top to right, bottom."""
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return mask


def save(folder: Path, **arrays: np.ndarray) -> list[str]:
    files = [folder / f"{name}.png" for name in arrays]
    for file, array in zip(files, arrays.values(), strict=True):
        Image.fromarray(array).save(file)
    return [str(file) for file in files]


def run_edit(model: Path, output: Path, *args: str, **options: Any) -> np.ndarray:
    chosen = {"model": model, "output": output} | options
    run(["edit", *(word for k, v in chosen.items() for word in (f"--{k}", str(v))), *args])
    return pixels(output)


def uint8(canvas_image: torch.Tensor) -> np.ndarray:
    return to_uint8(canvas_image[0]).permute(1, 2, 0).numpy()


# The command


def test_only_what_is_masked_changes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array, hole = picture(SIDE, SIDE), rectangle(SIDE, SIDE, (3, 4, 9, 12))
    image, mask = save(tmp_path, image=array, mask=hole)
    made = run_edit(model, tmp_path / "out.png", image=image, mask=mask, seed=3, **{"class": "DOG"})
    assert np.array_equal(made[hole == 0], array[hole == 0])
    assert not np.array_equal(made[hole > 0], array[hole > 0])
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    expected = edit(
        tiny_var(), edit_vae(), tensor, torch.from_numpy(hole > 0), torch.tensor([1]), seeds=[3], **SAMPLING
    )  # fmt: skip
    assert np.array_equal(made, uint8(expected))
    printed = capsys.readouterr()
    assert f"{image}: 12 x 12 px; 33% of 12 x 12 px are new" in printed.out
    assert "3/3" in printed.err


def test_without_a_class(model: Path, tmp_path: Path) -> None:
    array, hole = picture(SIDE, SIDE), rectangle(SIDE, SIDE, (0, 0, 6, 12))
    image, mask = save(tmp_path, image=array, mask=hole)
    made = run_edit(model, tmp_path / "out.png", image=image, mask=mask)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    expected = edit(tiny_var(), edit_vae(), tensor, torch.from_numpy(hole > 0), seeds=[0], **SAMPLING)
    assert np.array_equal(made, uint8(expected))
    assert "class" not in texts(tmp_path / "out.png")


def test_a_frame_around_the_picture(model: Path, tmp_path: Path) -> None:
    array = picture(9, 8)
    (image,) = save(tmp_path, image=array)
    made = run_edit(model, tmp_path / "out.png", "--outpaint", "1", "2", "4", "0", image=image)
    assert np.array_equal(made[4:, 1:10], array)
    array = picture(8, 8)
    (image,) = save(tmp_path, image=array)
    made = run_edit(model, tmp_path / "even.png", "--outpaint", "2", image=image)
    assert np.array_equal(made[2:10, 2:10], array)


def test_an_edit_can_be_made_again(model: Path, tmp_path: Path) -> None:
    image, mask = save(tmp_path, image=picture(20, 16), mask=rectangle(20, 16, (5, 5, 12, 12)))
    run_edit(
        model, tmp_path / "a.png", "--outpaint", "0", "1", "2", "0", image=image, mask=mask, seed=8, guidance=0.5,
        **{"class": "cat"},
    )  # fmt: skip
    found = texts(tmp_path / "a.png")
    assert found.items() >= {"class": "cat", "seed": "8", "guidance": "0.5", "image": image, "mask": mask}.items()
    run([*shlex.split(found["command"])[1:], "--output", str(tmp_path / "b.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("image '{tmp}/none.png' cannot be read as a picture", {"image": "{tmp}/none.png"}),
        ("image '{tmp}/text.png' cannot be read as a picture", {"image": "{tmp}/text.png"}),
        ("mask '{tmp}/text.png' cannot be read as a picture", {"mask": "{tmp}/text.png"}),
        ("there is nothing to fill", {"mask": "{tmp}/black.png"}),
        ("mask must have the image's size or proportions, 12 x 12 px, got 20 x 16", {"mask": "{tmp}/wide.png"}),
        ("output must be a .png file", {"output": "{tmp}/out.jpg"}),
        ("output exists: {tmp}/image.png; choose another, or --overwrite true", {"output": "{tmp}/image.png"}),
        ("class must be a number in 0..2", {"class": "3"}),
        ("outpaint must be pixels from 0 that leave room in 12 x 12 px, got [6, 6, 6, 6]", {"outpaint": "6"}),
        ("outpaint must be pixels from 0 that leave room in 12 x 12 px, got [-1, ", {"outpaint": "-1"}),
        ("outpaint", {"outpaint": "some"}),
    ],
)  # fmt: skip
def test_misuse_is_named(
    message: str, options: dict[str, str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, image=picture(SIDE, SIDE), mask=rectangle(SIDE, SIDE, (0, 0, 3, 3)))
    save(tmp_path, black=np.zeros((SIDE, SIDE), np.uint8), wide=rectangle(20, 16, (0, 0, 3, 3)))
    (tmp_path / "text.png").write_text("no picture")
    chosen = {"image": "{tmp}/image.png", "mask": "{tmp}/mask.png", "output": "{tmp}/out.png"} | options
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        run(["edit", f"--model={model}", *(f"--{k}={v.format(tmp=tmp_path)}" for k, v in chosen.items())])
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_outpaint_takes_one_number_or_four(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image,) = save(tmp_path, image=picture(SIDE, SIDE))
    with pytest.raises(SystemExit, match="2"):
        run_edit(model, tmp_path / "out.png", "--outpaint", "1", "2", image=image)
    assert "outpaint must be one number of pixels, or four, got [1, 2]" in capsys.readouterr().err


# Pictures and masks of any size and kind


def test_the_middle_of_a_large_picture(tmp_path: Path) -> None:
    array, hole = picture(50, 36), rectangle(50, 36, (10, 0, 11, 36))
    image, mask = save(tmp_path, image=array, mask=hole)
    canvas = make_canvas(image, mask, NONE, SIDE)
    middle = Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(7, 0, 43, 36))
    assert np.array_equal(uint8(canvas.image), np.asarray(middle))
    # column 10 is the fourth of the middle, three of which make a pixel
    assert canvas.hole.nonzero()[:, 1].unique().tolist() == [1]
    assert canvas.hole[:, 1].all()
    assert canvas.message == "50 x 36 px, of which the middle 36 x 36 become 12 x 12; 8% of 12 x 12 px are new"


def test_a_picture_lies_as_its_camera_says(tmp_path: Path) -> None:
    array = picture(SIDE, SIDE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(array).save(tmp_path / "image.png", exif=exif)
    (mask,) = save(tmp_path, mask=rectangle(SIDE, SIDE, (0, 0, 1, 1)))
    canvas = make_canvas(str(tmp_path / "image.png"), mask, NONE, SIDE)
    assert np.array_equal(uint8(canvas.image), np.rot90(array, -1))


@pytest.mark.parametrize("kind", ["1", "L", "RGB", "half", "double", "brush", "alpha"])
def test_masks_of_any_kind(kind: str, tmp_path: Path) -> None:
    array, hole = picture(24, 24), rectangle(24, 24, (4, 6, 20, 16))
    image, mask = save(tmp_path, image=array, mask=hole)
    grey = Image.fromarray(hole)
    if kind in ("1", "RGB"):
        grey.convert(kind).save(mask)
    if kind in ("half", "double"):
        side = 12 if kind == "half" else 48
        grey.resize((side, side), Image.Resampling.NEAREST).save(mask)
    if kind == "brush":  # white strokes on a layer that is white, too, where it is transparent
        Image.fromarray(np.dstack([np.full((24, 24, 3), 255, np.uint8), hole])).save(mask)
    if kind == "alpha":
        Image.fromarray(np.dstack([array, 255 - hole])).save(image)
    canvas = make_canvas(image, None if kind == "alpha" else mask, NONE, SIDE)
    wanted = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    wanted[3:8, 2:10] = True
    assert torch.equal(canvas.hole, wanted)


def test_what_is_transparent_leaves_no_trace(tmp_path: Path) -> None:
    hole = rectangle(48, 48, (10, 10, 29, 31))
    array, other = picture(48, 48), picture(48, 48, seed=1)
    other[hole == 0] = array[hole == 0]
    one, two = save(tmp_path, one=np.dstack([array, 255 - hole]), two=np.dstack([other, 255 - hole]))
    a, b = (make_canvas(image, None, NONE, SIDE) for image in (one, two))
    assert torch.equal(a.hole, b.hole)
    kept = ~a.hole.expand_as(a.image)
    assert torch.equal(a.image[kept], b.image[kept])


def test_a_mask_counts_more_than_transparency(tmp_path: Path) -> None:
    left, right = rectangle(SIDE, SIDE, (0, 0, 6, 12)), rectangle(SIDE, SIDE, (6, 0, 12, 12))
    image, mask = save(tmp_path, image=np.dstack([picture(SIDE, SIDE), 255 - left]), mask=right)
    canvas = make_canvas(image, mask, NONE, SIDE)
    assert torch.equal(canvas.hole, torch.from_numpy(right > 0))
    assert (uint8(canvas.image)[:, :6] == 255).all()  # laid on white
