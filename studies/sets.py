"""The data sets of the studies, at the quickstart's sizes, and their held-out images."""

import torch
import yaml
from torch import Tensor

from fvar_lightning import FocusSchedule, ImageDataModule
from fvar_lightning.cli import configs
from fvar_lightning.data.datasets import ImageDataset
from fvar_lightning.data.loaders import Passes
from fvar_lightning.data.photographs import PHOTOGRAPHS, PhotographDataset

QUICKSTART = configs() / "quickstart"

SETS = {
    "scenes128": QUICKSTART / "data.yaml",
    "FashionMNIST": configs() / "data" / "torchvision32.yaml",
    "photographs": QUICKSTART / "data.yaml",
}
NETWORKS = {"scenes128": [], "FashionMNIST": ["--model.ch_mult=[1, 2, 4]"], "photographs": []}
"""What the structure tokenizer needs beside the quickstart's arguments."""


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
    return ImageDataModule(
        **place(name, images), image_size=schedule.image_size, schedule=schedule, psf="none", num_workers=0
    )


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
