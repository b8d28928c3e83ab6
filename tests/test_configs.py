"""Every configuration in the repository builds its data module, task and trainer, on the meta device."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from PIL import Image

from fvar_lightning.cli import configs, main
from fvar_lightning.data.tokens import TokenizerIdentity, TokenMeta
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.build import build_tokenizer
from token_caches import write_cache

FOLDER = configs()
ALL = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
WHOLE = [name for name in ALL if {"data", "model"} <= set(yaml.safe_load((FOLDER / name).read_text()))]
DATA = [name for name in ALL if name.startswith("data/")]
BASE = "fvar_d12_256.yaml"
OVERRIDES = [name for name in ALL if name.startswith(("ablation/", "trainer/", "evaluation/"))]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small image folder, a token cache, and what writes tokenizers that fit a schedule."""
    root = tmp_path_factory.mktemp("places")
    for name in ("a", "b"):
        (root / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "images" / name / "0.png")
    return {"root": str(root), "images": str(root / "images")}


def write_tokenizers(root: Path, schedule: FocusSchedule) -> list[str]:
    """Tiny tokenizers of a schedule, as arguments of FVARTask."""
    levels = schedule.patch_size.bit_length()
    arguments = []
    for kind in ("structure", "alias"):
        description = {"kind": kind, "vocab_size": 8, "z_channels": 4, "ch": 4}
        if kind == "structure":
            description["ch_mult"] = [1] * levels
        tokenizer = build_tokenizer(schedule=schedule, **description)
        tokenizer.codebook.step()
        description["schedule"] = {
            "patch_nums": schedule.patch_nums,
            "patch_size": schedule.patch_size,
            "focus_states": schedule.focus_states,
            "max_radius": schedule.max_radius,
            "schedule": schedule.schedule,
        }
        weights = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}
        path = root / f"{kind}_{abs(hash(str(description)))}.ckpt"
        torch.save({"tokenizer": description, "state_dict": weights}, path)
        arguments.append(f"--model.{kind}_tokenizer={path}")
    return arguments


def schedule_of(names: list[str]) -> FocusSchedule:
    """What the configurations say of the schedule, later ones overriding."""
    values: dict[str, object] = {}
    for name in names:
        data = yaml.safe_load((FOLDER / name).read_text()).get("data", {})
        if isinstance(data, str):
            data = yaml.safe_load(((FOLDER / name).parent / data).read_text())
        values |= data.get("init_args", {}).get("schedule", {})
    return FocusSchedule(**values)  # type: ignore[arg-type]


def build(names: list[str], places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> object:
    content = yaml.safe_load((FOLDER / names[0]).read_text())
    root = Path(places["root"])
    args = [f"--config={FOLDER / name}" for name in names]
    args += ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--trainer.default_root_dir={root}"]
    model = content["model"]
    if isinstance(model, str):
        model = yaml.safe_load(((FOLDER / names[0]).parent / model).read_text())
    tokens = isinstance(content["data"], dict) and content["data"]["class_path"] == "TokenDataModule"
    schedule = schedule_of(["quickstart/structure.yaml"] if tokens else names)
    if tokens:
        cache = root / "cache"
        write_cache(cache, 2, TokenMeta(schedule, ["a", "b"], *[TokenizerIdentity(8, "", "disk")] * 2))
        args += [f"--data.path={cache}", f"--data.val_path={cache}"]
    else:
        args.append(f"--data.source={places['images']}")
    if model["class_path"] == "FVARTask":
        given = write_tokenizers(root, schedule)
        # an ablation without an alias tokenizer must stay without
        plain = any("alias_tokenizer: null" in (FOLDER / name).read_text() for name in names)
        args += given[:1] if plain else given
        if "initial_weights" in model["init_args"]:
            # official weights are not at hand; test_checkpoints.py starts from small ones
            args.append("--model.initial_weights=null")
    for method in ("fit", "predict"):
        original = getattr(Trainer, method)
        monkeypatch.setattr(Trainer, method, functools.wraps(original)(lambda *args, **kwargs: None))
    command = "predict" if names[0].endswith("tokens.yaml") else "fit"
    with torch.device("meta"):
        return main([command, *args])


@pytest.mark.parametrize("name", WHOLE)
def test_whole_configuration(name: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli = build([name], places, monkeypatch)
    depth = name.removeprefix("fvar_d").split("_")[0]
    if depth.isdigit():
        assert cli.model.student.depth == int(depth)
        assert cli.model.student.width == 64 * int(depth)
        assert cli.model.student.num_classes == 2


@pytest.mark.parametrize("name", OVERRIDES)
def test_override(name: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    build([BASE, name], places, monkeypatch)


@pytest.mark.parametrize("name", DATA)
def test_data_fragment(name: str) -> None:
    content = yaml.safe_load((FOLDER / name).read_text())
    options = content["init_args"]
    assert content["class_path"] == "ImageDataModule"
    assert FocusSchedule(**options["schedule"]).image_size == options["image_size"]


def test_no_configuration_is_left_out() -> None:
    fragments = {"quickstart/data.yaml", "quickstart/student.yaml"}
    assert set(ALL) == set(WHOLE) | set(DATA) | set(OVERRIDES) | fragments
