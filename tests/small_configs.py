"""The shipped configurations at sizes that a test can run: their files, with options that shrink them."""

from pathlib import Path
from typing import Any

import torch
import yaml

from fvar_lightning.cli import configs
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.build import build_tokenizer
from fvar_lightning.weights.describe import describe

FOLDER = configs()
PATCH = 2
"""Pixels of a token in the place of 16."""


def read(name: str) -> dict[str, Any]:
    """A configuration, with the fragments it names as its data and its model."""
    path = FOLDER / name
    content = yaml.safe_load(path.read_text())
    for part in ("data", "model"):
        if isinstance(content.get(part), str):
            content[part] = yaml.safe_load((path.parent / content[part]).read_text())
    return content


def schedule_of(names: list[str]) -> dict[str, Any]:
    """What the configurations say of the schedule, later ones overriding."""
    values: dict[str, Any] = {}
    for name in names:
        values |= read(name).get("data", {}).get("init_args", {}).get("schedule", {})
    return values


def psf_of(names: list[str]) -> str:
    """The last that a configuration names."""
    named = [read(name).get("data", {}).get("init_args", {}).get("psf") for name in names]
    return next((psf for psf in reversed(named) if psf is not None), "disk")


def small_schedule(values: dict[str, Any]) -> FocusSchedule:
    """Of as many scales, with small patches, and with small maps too where they are more than 32 tokens a side."""
    patch_nums = values.get("patch_nums", FocusSchedule().patch_nums)
    if patch_nums[-1] > 32:
        patch_nums = range(1, len(patch_nums) + 1)
    patch_size = values.get("patch_size", 16)
    patch_size = PATCH if patch_size == 16 else patch_size
    return FocusSchedule(**(values | {"patch_nums": tuple(patch_nums), "patch_size": patch_size}))


def data_options(schedule: FocusSchedule, source: Path | str) -> list[str]:
    """Of `ImageDataModule`."""
    return [
        f"--data.source={source}",
        f"--data.image_size={schedule.image_size}",
        f"--data.schedule.patch_nums={list(schedule.patch_nums)}",
        f"--data.schedule.patch_size={schedule.patch_size}",
        "--data.batch_size=2",
        "--data.num_workers=0",
    ]


def model_options(task: str, schedule: FocusSchedule) -> list[str]:
    """Of a task, but for the files it reads."""
    if task == "FVARTask":
        return ["--model.depth=2", "--model.width=16", "--model.heads=1"]
    options = ["--model.vocab_size=16", "--model.z_channels=4", "--model.ch=4", "--model.warmup_steps=0"]
    if task == "TokenizerTask":
        levels = schedule.patch_size.bit_length()
        options += [f"--model.ch_mult={[1] * levels}", "--model.norm_groups=4", "--model.num_res_blocks=1"]
    return options


def trainer_options(name: str, root: Path, steps: int = 1) -> list[str]:
    """One process on the CPU, and so many steps, of two batches where the configuration accumulates more."""
    accumulates = "accumulate_grad_batches" in read(name)["trainer"]
    return [
        *(["--trainer.accumulate_grad_batches=2"] if accumulates else []),
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={root}",
    ]


def write_tokenizers(root: Path, schedule: FocusSchedule, psf: str) -> dict[str, Path]:
    """Untrained ones of a schedule, structure and alias."""
    paths = {}
    levels = schedule.patch_size.bit_length()
    for kind, sizes in (("structure", {"ch_mult": [1] * levels, "norm_groups": 4}), ("alias", {})):
        tokenizer = build_tokenizer(kind, schedule, psf=psf, vocab_size=16, z_channels=4, ch=4, **sizes)
        tokenizer.codebook.step()
        weights = {f"tokenizer.{name}": x for name, x in tokenizer.state_dict().items()}
        paths[kind] = root / f"{kind}.ckpt"
        torch.save({"tokenizer": describe(tokenizer), "state_dict": weights}, paths[kind])
    return paths
