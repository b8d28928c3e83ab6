"""`fvar generate` as a user meets it: the files, what is written in them, the classes, what is refused."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fvar_lightning.__main__ import run
from fvar_lightning.commands.classes import find_label, spelled
from fvar_lightning.commands.model import choose_device, choose_precision
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.generation.sampling import generate
from fvar_lightning.weights.official import export_var_checkpoint
from fvar_lightning.weights.pretrained import SAMPLING as DEFAULTS
from fvar_lightning.weights.pretrained import save_pretrained, save_safetensors
from test_checkpoints import NAMES, SAMPLING, task_checkpoint, tiny_vae, tiny_var

SIDE = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, tiny_var(), tiny_vae(), class_names=NAMES, sampling=SAMPLING)
    return folder


def make(model: Path, output: Path, *classes: str, **options: Any) -> None:
    chosen = {"model": model, "output": output, "batch_size": 1} | options
    run(["generate", "--classes", *classes, *(word for k, v in chosen.items() for word in (f"--{k}", str(v)))])


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def texts(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def expected(label: int, seed: int, **options: Any) -> np.ndarray:
    """By the library, without the command."""
    (image,) = generate(tiny_var(), tiny_vae(), torch.tensor([label]), seeds=[seed], **(SAMPLING | options))
    return to_uint8(image).permute(1, 2, 0).numpy()


def test_images_a_file_each_and_a_sheet(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(model, tmp_path, "EIN KÄFER", "0", count=2, seed=5)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [
        "0000_cat_000007.png", "0000_cat_000008.png", "0002_ein_Käfer_000005.png", "0002_ein_Käfer_000006.png",
        "contact_sheet.png",
    ]  # fmt: skip
    for file, (label, seed) in zip(files, [(0, 7), (0, 8), (2, 5), (2, 6)], strict=False):
        assert np.array_equal(pixels(file), expected(label, seed))
    sheet = pixels(files[-1])
    columns = [sheet[:, -2 * (SIDE + 4) :][:, i * (SIDE + 4) :][:, :SIDE] for i in range(2)]
    for row, names in enumerate((files[2:4], files[:2])):
        for column, file in zip(columns, names, strict=True):
            assert np.array_equal(column[4 + row * (SIDE + 4) :][:SIDE], pixels(file))
    printed = capsys.readouterr()
    assert f"wrote 4 images and {files[-1]}" in printed.out
    assert "12/12" in printed.err  # four batches of three scales


def test_an_image_can_be_made_again(model: Path, tmp_path: Path) -> None:
    options = {"guidance": 1.25, "top_k": 7, "top_p": 0.75, "more_smooth": "true", "focus": 1.0}
    make(model, tmp_path / "a", "dog", "cat", count=2, seed=40, **options)
    file = tmp_path / "a" / "0000_cat_000043.png"
    found = texts(file)
    assert found.items() >= {
        "model": str(model), "class": "cat", "label": "0", "seed": "43", "guidance": "1.25", "top_k": "7",
        "top_p": "0.75", "more_smooth": "True", "focus": "1.0", "precision": "float32", "device": "cpu",
    }.items()  # fmt: skip
    assert json.loads(found["versions"])["torch"] == torch.__version__.split("+")[0]
    assert len(found["weights_sha256"]) == 64
    fvar, *command = shlex.split(found["command"])
    assert fvar == "fvar"
    run([*command, "--output", str(tmp_path / "b")])
    again = tmp_path / "b" / file.name
    assert again.read_bytes() == file.read_bytes()
    assert {f.name for f in (tmp_path / "b").iterdir()} == {file.name, "contact_sheet.png"}
    changed = expected(0, 43, guidance=1.25, top_k=7, top_p=0.75, more_smooth=True)
    assert not np.array_equal(changed, pixels(file))  # sharp


def test_guidance_at_every_scale(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path / "a", "dog", count=1, guidance="[0.0, 3.0, 0.5]")
    file = tmp_path / "a" / "0001_dog_000000.png"
    assert np.array_equal(pixels(file), expected(1, 0, guidance=[0.0, 3.0, 0.5]))
    run([*shlex.split(texts(file)["command"])[1:], "--output", str(tmp_path / "b")])
    assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_a_sheet_can_be_made_again(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path / "a", "dog", "cat", count=2)
    command = shlex.split(texts(tmp_path / "a" / "contact_sheet.png")["command"])[1:]
    run([*command, "--output", str(tmp_path / "b"), "--batch_size", "1"])
    for file in (tmp_path / "a").iterdir():
        assert np.array_equal(pixels(file), pixels(tmp_path / "b" / file.name))


def test_a_model_of_any_kind(model: Path, tmp_path: Path) -> None:
    var, vae = tiny_var(), tiny_vae()
    save_safetensors(tmp_path / "one.safetensors", var, vae, class_names=NAMES)
    task_checkpoint(tmp_path / "last.ckpt", var, vae)
    with pytest.warns(UserWarning, match="ch_mult"):
        export_var_checkpoint(vae, var, tmp_path / "vae.pth", tmp_path / "var_d2.pth")
    hashes = set()
    for i, source in enumerate((model, tmp_path / "one.safetensors", tmp_path / "last.ckpt", tmp_path)):
        make(source, tmp_path / str(i), "2", count=1, **SAMPLING)
        (file,) = (tmp_path / str(i)).glob("0002_*.png")
        assert np.array_equal(pixels(file), expected(2, 0))
        hashes.add(texts(file)["weights_sha256"])
    # an official file has no statistics of the codebook
    assert len(hashes) == 2


def test_batches_are_bounded(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(model, tmp_path / "a", "dog", count=5, batch_size=2)
    assert "9/9" in capsys.readouterr().err
    run(["generate", "--model", str(model), "--classes", "dog", "--count", "5", "--output", str(tmp_path / "b")])
    assert "3/3" in capsys.readouterr().err


def test_a_blurred_image_takes_fewer_scales(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(model, tmp_path, "dog", count=1, focus=2.0)
    assert "2/2" in capsys.readouterr().err
    assert np.array_equal(pixels(tmp_path / "0001_dog_000000.png"), expected(1, 0, focus=2.0))


def test_half_precision(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path, "dog", count=1, precision="bfloat16")
    assert texts(tmp_path / "0001_dog_000000.png")["precision"] == "bfloat16"
    (image,) = generate(
        tiny_var().bfloat16(), tiny_vae().bfloat16(), torch.tensor([1]), seeds=[0], **SAMPLING
    )  # fmt: skip
    assert np.array_equal(pixels(tmp_path / "0001_dog_000000.png"), to_uint8(image).permute(1, 2, 0).numpy())


def test_files_are_replaced_only_where_that_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(model, tmp_path, "dog", count=1)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        make(model, tmp_path, "dog", count=1, guidance=0.0)
    assert f"output exists: {tmp_path / '0001_dog_000000.png'}" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    make(model, tmp_path, "dog", count=1, guidance=0.0, overwrite="true")
    assert texts(tmp_path / "0001_dog_000000.png")["guidance"] == "0.0"


@pytest.mark.parametrize(
    ("message", "classes", "options"),
    [
        ("class must be a number in 0..2 or the name of a class, got 'dgo'; close are dog (1)", ["dgo"], {}),
        ("file '{tmp}/no.safetensors' does not exist", ["0"], {"model": "{tmp}/no.safetensors"}),
        ("checkpoint '{tmp}/no.ckpt' does not exist", ["0"], {"model": "{tmp}/no.ckpt"}),
        ("folder '{tmp}' must hold config.json and model.safetensors", ["0"], {"model": "{tmp}"}),
        ("focus must lie in 0..2 pixels", ["0"], {"focus": 3}),
        ("top_p must lie in [0, 1]", ["0"], {"top_p": 2}),
        ("guidance must be a finite number", ["0"], {"guidance": -1}),
        ("device must be 'auto' or one that torch has here, got 'toaster'", ["0"], {"device": "toaster"}),
        ("precision", ["0"], {"precision": "int8"}),
        ("count", ["0"], {"count": 0}),
        ("batch_size", ["0"], {"batch_size": 0}),
        ("seed", ["0"], {"seed": -1}),
    ],
)  # fmt: skip
def test_misuse_is_named(
    message: str, classes: list[str], options: dict[str, Any], model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = {name: str(value).format(tmp=tmp_path) for name, value in options.items()}
    with pytest.raises(SystemExit, match="2"):
        make(options.pop("model", model), tmp_path / "out", *classes, **options)
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Classes


def test_classes_by_name_and_number() -> None:
    names = ["Cardigan", "crane", "tabby", "cardigan", "crane", "10", "Persian cat"]
    for wanted, label in (("TABBY", 2), ("Cardigan", 0), ("cardigan", 3), ("4", 4), ("10", 5), ("persian CAT", 6)):
        assert find_label(wanted, names) == label
    for wanted, message in (
        ("CARDIGAN", "'CARDIGAN' is what several are called: give a number, 0 or 3"),
        ("crane", "give a number, 1 or 4"),
        ("cat", r"got 'cat'; close are Persian cat \(6\)"),
        ("7", "must be a number in 0..6 or"),
        ("-1", "must be a number in 0..6 or"),
        ("zzz", "it knows Cardigan, crane, tabby, cardigan, crane, 10, Persian cat$"),
    ):
        with pytest.raises(ValueError, match=message):
            find_label(wanted, names)
    for label in range(len(names)):
        assert find_label(spelled(label, names), names) == label


# Devices


def test_what_is_chosen_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for there, device in ((False, cpu), (True, cuda)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == device
    assert choose_device("cpu") == cpu
    for supported, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported",
            lambda including_emulation=True, supported=supported: supported or including_emulation,
        )  # fmt: skip
        assert choose_precision("auto", cuda) == precision
        assert choose_precision("auto", cpu) == "float32"
        assert choose_precision("bfloat16", cpu) == "bfloat16"


def test_the_defaults_of_a_model_without_any_are_those_of_generate() -> None:
    assert generate.__kwdefaults__.items() >= DEFAULTS.items()


def test_generating_does_not_import_lightning(model: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--model", str(model), "--classes", "cat", "--count", "1", "--output", str(tmp_path)]
    absent = {"lightning", "pytorch_lightning", "torch_fidelity", "torchmetrics"}
    code = (
        f"import sys; from fvar_lightning.__main__ import run; run({arguments}); "
        f"print(*sorted(set(sys.modules) & {absent}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [""]
