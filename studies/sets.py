"""The data sets of the studies, at the quickstart's sizes, and their held-out images."""

import hashlib
import os
from pathlib import Path

import torch
import yaml
from torch import Tensor

from fvar_lightning import FocusSchedule, ImageDataModule
from fvar_lightning.cli import configs
from fvar_lightning.data.datasets import FolderDataset, ImageDataset
from fvar_lightning.data.fingerprint import fingerprint
from fvar_lightning.data.loaders import Passes
from fvar_lightning.data.photographs import PHOTOGRAPHS, PhotographDataset
from fvar_lightning.data.sources import Source
from fvar_lightning.data.torchvision_sets import TorchvisionDataset

QUICKSTART = configs() / "quickstart"
FEWER = {"train": 10_000, "val": 2_000}
"""Images of each part of a torchvision data set, its first ones: more than a study's steps see, and quick to encode."""


class FewerImages(ImageDataModule):
    """`ImageDataModule` with the first images of a torchvision data set only."""

    def find_source(self) -> Source:
        source = super().find_source()
        for part, count in FEWER.items():
            if isinstance(whole := getattr(source, part), TorchvisionDataset):
                indices = whole.indices[:count]
                kept = TorchvisionDataset(whole.wrapped, whole.class_names, whole.transform, indices, seed=whole.seed)
                source = source._replace(**{part: kept})
        return source


SETS = {
    "scenes128": QUICKSTART / "data.yaml",
    "FashionMNIST": Path(__file__).with_name("fashion_mnist.yaml"),
    "photographs": QUICKSTART / "data.yaml",
}
NETWORKS = {"scenes128": [], "FashionMNIST": ["--model.ch_mult=[1, 2, 4]"], "photographs": []}
"""What the structure tokenizer needs beside the quickstart's arguments."""
TOKENIZER_STEPS, STAGE_2_STEPS = 500, 400
"""Of the quickstart, at effort 1."""
STUDENT = ["--model.depth=4", "--model.width=128", "--model.heads=4"]
"""A smaller one than the quickstart's: so many arms and seeds fit into hours."""


def place(name: str, images: str | None) -> dict[str, str | None]:
    """Arguments of `ImageDataModule` that tell where a set's images lie."""
    if name == "FashionMNIST":
        return {"source": name, "root": images}
    return {"source": name if name == "photographs" else images}


def images_of(name: str, images: str | None, seed: int) -> list[str]:
    """Arguments of the command line that choose the images."""
    where = [f"--data.{option}={value}" for option, value in place(name, images).items()]
    return [f"--data={SETS[name]}", *where, "--data.batch_size=16", f"--data.seed={seed}"]


def data_module(name: str, images: str | None) -> ImageDataModule:
    """The images, with the set's own schedule."""
    schedule = FocusSchedule(**yaml.safe_load(SETS[name].read_text())["init_args"]["schedule"])
    return FewerImages(
        **place(name, images), image_size=schedule.image_size, schedule=schedule, psf="none", num_workers=0
    )


def contents(images: ImageDataset | PhotographDataset) -> str:
    """16 hexadecimal digits of what a data set holds: of a folder its files, whenever they were written."""
    if not isinstance(images, FolderDataset):
        return fingerprint(images)
    digest = hashlib.sha256(repr(images.transform).encode())
    for name in images.images.files.tolist():
        digest.update(name + b"\0" + Path(os.fsdecode(images.images.root), os.fsdecode(name)).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def held_out(data: ImageDataModule, count: int) -> Tensor:
    """Validation images, (count, 3, H, W) uint8: some of them in an order that mixes the classes, or several random
    crops of each where there are fewer."""
    images = data.real_images("val")
    if isinstance(images, PhotographDataset):
        images.crops_per_photograph = -(-count // len(PHOTOGRAPHS))
    elif isinstance(images, ImageDataset) and len(images) < count:
        images.transform = data.options.transform
    passes = -(-count // len(images))
    order = torch.randperm(passes * len(images), generator=torch.Generator().manual_seed(0))[:count]
    crops = Passes(images, len(images), passes)
    return torch.stack([crops[i][0] for i in order.tolist()])
