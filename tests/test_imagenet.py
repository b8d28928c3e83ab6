"""The commands of docs/imagenet.md, each as it stands there, with options behind it that make it small."""

import json
import logging
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed

import small_configs
from evaluation_worker import TinyExtractor
from fvar_lightning.__main__ import run
from fvar_lightning.metrics.extractors import FeatureExtractor, Inception
from fvar_lightning.weights.checkpoints import load_tokenizer
from fvar_lightning.weights.models import from_pretrained

DOCUMENT = Path(__file__).parents[1] / "docs" / "imagenet.md"
SIZE = small_configs.small_schedule({}).image_size
STEPS = 3
"""Of every fit: the second sets the codes of a tokenizer."""


def commands() -> list[str]:
    """Of all code blocks, one a line."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


def small(arguments: list[str]) -> list[str]:
    """The options that make a command small, by the configurations that it names."""
    names = [name.removeprefix("configs/") for option, name in pairwise(arguments) if option == "-c"]
    if arguments[0] == "export":
        return []
    schedule = small_configs.small_schedule(small_configs.schedule_of(names))
    options = small_configs.trainer_options(names[0], Path("runs"), STEPS)
    options += small_configs.model_options(small_configs.read(names[0])["model"]["class_path"], schedule)
    if "--ckpt_path" in arguments:  # which knows its sizes
        options = [option for option in options if not option.startswith("--model.")]
    if "--data" in arguments:
        options += ["--data.batch_size=2", "--data.num_workers=0"]
    else:
        options += small_configs.data_options(schedule, "imagenet")
    if "trainer/fsdp2_bf16.yaml" in names:
        options.append("--trainer.strategy.init_args.data_parallel_size=1")
    if "evaluation/protocol.yaml" in names:
        options.append("--trainer.callbacks.num_samples=4")
    if "evaluation/samples.yaml" in names:
        options.append("--data.samples_per_class=1")
    return options


def make_imagenet(folder: Path) -> None:
    """Two classes, six images of each for training, two for validation."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.JPEG")


def make_reference(path: Path) -> None:
    """Of the tiny extractor that takes Inception's place, in the form of the ADM suite."""
    images = np.random.default_rng(1).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    features = TinyExtractor()(torch.from_numpy(images).permute(0, 3, 1, 2)).features.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=features.mean(0), sigma=np.cov(features.T), arr_0=images)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as the document asks for, the evaluations' numbers of images made small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Inception, "__init__", lambda self: FeatureExtractor.__init__(self, "inception", 12))
    monkeypatch.setattr(Inception, "extract", lambda _, images: TinyExtractor().extract(images))
    make_imagenet(tmp_path / "imagenet")
    make_reference(tmp_path / "checkpoints" / "VIRTUAL_imagenet256_labeled.npz")
    shutil.copytree(small_configs.FOLDER, tmp_path / "configs")
    offline = tmp_path / "configs" / "evaluation" / "offline.yaml"
    offline.write_text(re.sub(r"num_samples: \d+", "num_samples: 4", offline.read_text()))
    yield tmp_path
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_the_tokenizers_of_256_px_serve_512_px(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The shortest way through the document."""
    caplog.set_level(logging.INFO)
    needed = re.compile(r"(fvar fit -c configs/(tokenizer|fvar_d36_512)|mkdir|cp|python|fvar export .*models/fvar_d36)")
    way = [command for command in commands() if needed.match(command)]
    assert len(way) == 8
    follow(way)
    told = [r.getMessage() for r in caplog.records if "it serves" in r.getMessage()]
    assert [message.split()[0] for message in told] == ["structure_tokenizer", "alias_tokenizer"]
    check_model(workplace, "fvar_d36_512")


@pytest.mark.slow
def test_the_documented_commands(workplace: Path) -> None:
    follow(commands())
    schedule = small_configs.small_schedule({})
    for kind in ("structure", "alias"):
        assert load_tokenizer(workplace / "checkpoints" / f"{kind}.ckpt").schedule == schedule
    for part, rows in (("train", 24), ("val", 4)):
        assert json.loads((workplace / "tokens" / part / "index.json").read_text())["layout"]["rows"] == rows
    reports = {path.name for path in workplace.rglob("generation_*.json")}
    assert reports == {"generation_inception.json", "generation_efficientnet_lite0.json"}
    assert np.load(workplace / "samples" / "samples.npz")["arr_0"].shape == (2, SIZE, SIZE, 3)
    assert len(list((workplace / "models" / "official").glob("*.pth"))) == 2
    for name in ("fvar_d12_256", "fvar_d36_512", "fvar_d16_1024"):
        check_model(workplace, name)


def follow(commands: list[str]) -> None:
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "fvar":
            run([*arguments, *small(arguments)])
            if distributed.is_initialized():
                distributed.destroy_process_group()
        elif program == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", arguments[1:])
                runpy.run_module(arguments[1], run_name="__main__")
        else:
            subprocess.run([program, *arguments], check=True)


def check_model(workplace: Path, name: str) -> None:
    """At its own image size, with the classes of the folders."""
    var, vae, info = from_pretrained(workplace / "models" / name)
    assert vae.schedule == small_configs.small_schedule(small_configs.schedule_of([f"{name}.yaml"]))
    assert var.layout.patch_nums == vae.schedule.patch_nums
    assert info.class_names == ["n01440764", "n01443537"]
