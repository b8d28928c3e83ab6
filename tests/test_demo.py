"""What the buttons of `fvar demo` do, without its page: images at any focus, edits, uploads, what is refused."""

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fvar_lightning.__main__ import run
from fvar_lightning.commands.demo import handlers
from fvar_lightning.commands.demo.handlers import Generation
from fvar_lightning.commands.model import ModelOptions, ReadyModel, SamplingOptions
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.generation.sampling import generate, generate_stages
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.weights.pretrained import save_pretrained
from test_checkpoints import NAMES, SAMPLING, tiny_var
from test_edit_command import edit_vae, picture, rectangle
from test_generate_command import pixels, texts

SIDE = 12
NONE = (0, 0, 0, 0)
STRONGER = SamplingOptions(guidance=1.0, top_k=7, top_p=0.75)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> ReadyModel:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, tiny_var(), edit_vae(), class_names=NAMES, sampling=SAMPLING)
    return ModelOptions(str(folder)).load()


def sampled(ready: ReadyModel, label: int = 1, seed: int = 4, sampling: SamplingOptions = STRONGER) -> Generation:
    return handlers.sample_image(ready, "tiny", label, seed, sampling, iter)


def array(image: Tensor) -> np.ndarray:
    return to_uint8(image).permute(1, 2, 0).numpy()


def saved(shown: Image.Image, file: Path) -> Path:
    """As the page stores it: a PNG with the texts."""
    info = PngInfo()
    for name, text in shown.info.items():
        info.add_text(name, text)
    shown.save(file, pnginfo=info)
    return file


# Images


def test_an_image_at_every_focus_is_sampled_once(ready: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampled(ready)
    options = {"guidance": 1.0, "top_k": 7, "top_p": 0.75}
    expected = {
        focus: generate(tiny_var(), edit_vae(), torch.tensor([1]), seeds=[4], focus=focus, **options)[0]
        for focus in (0.0, 0.4, 1.0, 2.0)
    }
    monkeypatch.setattr(ready.var, "step", None)  # whoever samples now fails
    for focus, image in expected.items():
        assert np.array_equal(np.asarray(handlers.focused(ready, made, focus)), array(image))
    with pytest.raises(ValueError, match=r"focus must lie in 0\.\.2 pixels"):
        handlers.focused(ready, made, 2.5)


def test_an_image_of_the_page_is_made_again_by_the_command(ready: ReadyModel, tmp_path: Path) -> None:
    shown = handlers.focused(ready, sampled(ready), 0.5)
    file = saved(shown, tmp_path / "shown.png")
    assert texts(file)["class"] == "dog"
    run([*shlex.split(texts(file)["command"])[1:], "--output", str(tmp_path / "again")])
    again = tmp_path / "again" / "0001_dog_000004.png"
    assert np.array_equal(pixels(again), pixels(file))
    assert texts(again) == texts(file)


def test_the_strip_shows_the_image_after_every_scale(ready: ReadyModel) -> None:
    shown = np.asarray(handlers.strip(ready, sampled(ready)))
    stages = generate_stages(
        tiny_var(), edit_vae(), torch.tensor([1]), seeds=[4], guidance=1.0, top_k=7, top_p=0.75
    )  # fmt: skip
    side, gap = handlers.STRIP_SIDE, 4
    assert shown.shape[1] == 12 + len(stages) * (side + gap)
    for i, stage in enumerate(stages):
        tile = shown[22 : 22 + side, 12 + i * (side + gap) :][:, :side]
        centres = ((np.arange(SIDE) + 0.5) * side / SIDE).astype(int)
        assert np.array_equal(tile[centres][:, centres], array(stage[0]))


def test_what_a_model_prefers_counts_where_nothing_is_wished(ready: ReadyModel) -> None:
    made = sampled(ready, sampling=SamplingOptions())
    assert made.settings.items() >= SAMPLING.items()


def test_progress_goes_by_scales(ready: ReadyModel) -> None:
    steps = []

    def watch(stages: Iterable[Tensor]) -> Iterator[Tensor]:
        for stage in stages:
            steps.append(stage.shape)
            yield stage

    handlers.sample_image(ready, "tiny", 0, 0, STRONGER, watch)
    hole = Image.fromarray(rectangle(SIDE, SIDE, (0, 0, 4, 4)))
    handlers.fill(ready, Image.new("RGB", (SIDE, SIDE)), hole, NONE, 0, 0, STRONGER, watch)
    assert len(steps) == 2 * 3


@pytest.mark.parametrize(
    ("message", "label", "seed", "sampling"),
    [
        ("seed must be a whole number from 0", 0, None, STRONGER),
        ("seed must be a whole number from 0", 0, -1, STRONGER),
        ("seed must be a whole number from 0", 0, 2**63, STRONGER),
        ("class must be one of the model's 3, got None", None, 0, STRONGER),
        ("class must be one of the model's 3, got 3", 3, 0, STRONGER),
        ("guidance must be a finite number from 0", 0, 0, SamplingOptions(guidance=float("inf"))),
        (r"top_p must lie in \[0, 1\]", 0, 0, SamplingOptions(top_p=2.0)),
    ],
)
def test_wishes_that_cannot_be(
    message: str, label: int | None, seed: int | None, sampling: SamplingOptions, ready: ReadyModel
) -> None:
    with pytest.raises(ValueError, match=message):
        handlers.sample_image(ready, "tiny", label, seed, sampling, iter)


# Photographs


def test_a_photograph_is_upright_and_small(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(picture(1500, 900)).save(tmp_path / "photo.jpg", exif=exif)
    read = handlers.read_photograph(str(tmp_path / "photo.jpg"))
    assert (read.mode, read.size) == ("RGB", (614, 1024))
    small = Image.fromarray(picture(40, 30))
    small.save(tmp_path / "small.png")
    assert np.array_equal(np.asarray(handlers.read_photograph(str(tmp_path / "small.png"))), np.asarray(small))


def test_uploads_that_are_no_pictures(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(picture(64, 64)).save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(picture(8, 8)).save(tmp_path / "drawing.eps")
    Image.new("L", (4000, 2)).save(tmp_path / "strip.png")
    for name in ("half.jpg", "text.png", "empty.png", "drawing.eps", "strip.png", "none.png"):
        with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
            handlers.read_photograph(str(tmp_path / name))
        assert str(tmp_path) not in str(caught.value)


def test_a_huge_picture_in_a_small_file_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (8000, 7000)).save(bomb)
    assert bomb.stat().st_size < 20_000
    monkeypatch.setattr(handlers, "load_image", None)
    with pytest.raises(ValueError, match="measures 8000 x 7000 px: up to 50 megapixels are accepted"):
        handlers.read_photograph(str(bomb))


# Editing


def test_only_what_was_painted_changes(ready: ReadyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    square = handlers.middle(Image.fromarray(picture(40, 30)), SIDE)
    canvas = handlers.to_paint_on(square)
    assert canvas.size == (504, 504)
    layer = Image.new("RGBA", canvas.size)
    ImageDraw.Draw(layer).ellipse((130, 170, 300, 400), fill="white")
    mask = handlers.mask_of(handlers.painted([layer, Image.new("RGBA", canvas.size)]), SIDE)
    touched = np.asarray(layer)[..., 3].reshape(SIDE, 42, SIDE, 42).any(axis=(1, 3))
    assert np.array_equal(np.asarray(mask), 255 * touched)

    made = handlers.fill(ready, square, mask, NONE, 2, 3, STRONGER, iter)
    assert np.array_equal(np.asarray(made)[~touched], np.asarray(square)[~touched])
    assert not np.array_equal(np.asarray(made)[touched], np.asarray(square)[touched])

    monkeypatch.chdir(tmp_path)
    square.save("photograph.png")
    mask.save("mask.png")
    run([*shlex.split(made.info["command"])[1:], "--output", "again.png"])
    assert np.array_equal(pixels(Path("again.png")), np.asarray(made))


def test_a_frame_around_a_photograph(ready: ReadyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph = Image.fromarray(picture(9, 8))
    made = handlers.fill(ready, photograph, None, (1, 2, 4, 0), None, 3, STRONGER, iter)
    assert np.array_equal(np.asarray(made)[4:, 1:10], np.asarray(photograph))
    monkeypatch.chdir(tmp_path)
    photograph.save("photograph.png")
    run([*shlex.split(made.info["command"])[1:], "--output", "again.png"])
    assert np.array_equal(pixels(Path("again.png")), np.asarray(made))


def test_edits_that_cannot_be(ready: ReadyModel) -> None:
    square, black = Image.new("RGB", (SIDE, SIDE)), Image.new("L", (SIDE, SIDE))
    for message, photograph, mask, around, label in (
        ("upload a photograph first", None, None, (1, 1, 1, 1), None),
        ("there is nothing to fill", square, black, NONE, None),
        ("there is nothing to fill", square, None, NONE, None),
        (r"leave room in 12 x 12 px, got \[6, 6, 0, 0\]", square, None, (6, 6, 0, 0), None),
        ("class must be one of the model's 3, got 7", square, None, (1, 1, 1, 1), 7),
    ):
        with pytest.raises(ValueError, match=message):
            handlers.fill(ready, photograph, mask, around, label, 0, STRONGER, iter)
    with pytest.raises(ValueError, match="there is nothing to fill: paint over"):
        handlers.painted([])


# Optics


def test_the_pyramid_of_a_photograph() -> None:
    schedule = FocusSchedule((1, 2, 4), patch_size=4, focus_states=2, max_radius=3.0)
    photograph = Image.fromarray(picture(16, 16))
    shown = np.asarray(handlers.focus_pyramid(photograph, schedule, "gaussian", 3.0))
    tensor = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 127.5 - 1
    views = Refocus(schedule, "gaussian")(tensor)
    side, gap = 144, 4
    left = shown.shape[1] - 3 * (side + gap)
    expected = (views.downsampled, views.focused, [3 * a for a in views.alias])
    for row, images in enumerate(expected):
        for column, image in enumerate(images):
            tile = shown[22 + row * (side + gap) :, left + column * (side + gap) :][:side, :side]
            size = image.shape[-1]
            centres = ((np.arange(size) + 0.5) * side / size).astype(int)
            difference = tile[centres][:, centres].astype(int) - array(image[0])
            assert np.abs(difference).max() <= 1
    with pytest.raises(ValueError, match="upload a photograph first"):
        handlers.focus_pyramid(None, schedule, "disk", 2.0)


# The command


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "fvar_lightning.commands.demo.server", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        run(["demo", "--model", "none.ckpt"])
    assert "the demo needs the extra `app`: pip install 'fvar-lightning[app]'" in capsys.readouterr().err
