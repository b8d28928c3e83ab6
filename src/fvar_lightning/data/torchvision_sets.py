"""The classification data sets of torchvision, by name."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset

from fvar_lightning.data.datasets import ImageDataset, hold_out
from fvar_lightning.data.images import ImageTransform, to_rgb

TRAIN_SPLITS = ("train", "trainval", "train-standard")
VAL_SPLITS = ("val", "test", "valid")


class TorchvisionDataset(ImageDataset):
    """A classification data set of torchvision. `indices` picks some of its samples; others as for `ImageDataset`."""

    def __init__(
        self,
        wrapped: Dataset,
        class_names: list[str],
        transform: ImageTransform,
        indices: Sequence[int] | np.ndarray,
        **options: Any,
    ) -> None:
        super().__init__(len(indices), class_names, transform, **options)
        self.wrapped = wrapped
        self.indices = np.asarray(indices)

    def name(self, index: int) -> str:
        return f"{type(self.wrapped).__name__}[{self.indices[index]}]"

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.wrapped[int(self.indices[index])]
        return to_rgb(image), int(label)


def load_torchvision(
    name: str, root: str | Path, val_fraction: float = 0.1, download: bool = False
) -> tuple[list[str], tuple[Dataset, np.ndarray], tuple[Dataset, np.ndarray]]:
    """Class names, and training and validation part as (data set, indices into it), of a torchvision data set.

    Its own test or validation part is used if it has one; otherwise `val_fraction` of it is held out. With `download`,
    of all processes that ask for the same data one downloads what is missing while the others wait.

    Raises:
        ValueError: if torchvision has no such data set, its files are missing, or it is not one of classification.
    """
    kind = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or not isinstance(kind, type):
        raise ValueError(f"source {name!r} is no data set of torchvision, see torchvision.datasets for those it has")
    train, val = _parts(kind, Path(root).expanduser(), download)
    if not isinstance(train[0][1], Integral):
        raise ValueError(f"source {name!r} is no classification data set, its targets are {train[0][1]!r}")
    if val is not train:
        return _class_names(train), (train, np.arange(len(train))), (val, np.arange(len(val)))
    kept, held_out = hold_out(len(train), val_fraction)
    return _class_names(train), (train, kept), (train, held_out)


def _parts(kind: type, root: Path, download: bool) -> tuple[Any, Any]:
    """Training and validation part; the same object twice where there is only one."""
    name, accepted = kind.__name__, _parameters(kind)
    options = {"root": str(root)} | ({"download": download} if "download" in accepted else {})

    def make(**part: Any) -> Any:
        try:
            return kind(**options, **part)
        except (RuntimeError, OSError) as error:
            if options.get("download"):
                raise ValueError(f"{name} could not be downloaded into root {str(root)!r}: {error}") from error
            remedy = "--data.download=true fetches it" if "download" in options else "torchvision cannot download it"
            raise ValueError(f"root {str(root)!r} does not hold the data set {name} ({error}): {remedy}") from error
        except ImportError as error:
            raise ValueError(f"source {name!r} needs a package that is not installed: {error}") from error
        except TypeError as error:
            raise ValueError(f"source {name!r} cannot be used, it takes other arguments: {error}") from error

    if options.get("download"):
        root.mkdir(parents=True, exist_ok=True)
    # not in a hook of Lightning: the command line asks for the class names before there is a trainer
    with FileLock(root / f".{name}.lock") if options.get("download") else nullcontext():
        if "train" in accepted:
            return make(train=True), make(train=False)
        if "split" in accepted:
            return _first_split(make, TRAIN_SPLITS), _first_split(make, VAL_SPLITS)
        whole = make()
        return whole, whole


def _parameters(kind: type) -> set[str]:
    """Names that the constructor takes, those it passes on to its bases' included."""
    names: set[str] = set()
    for cls in kind.__mro__:
        parameters = inspect.signature(cls).parameters
        names |= parameters.keys()
        if all(p.kind != inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _first_split(make: Callable[..., Any], splits: Sequence[str]) -> Any:
    """The first split the data set knows; torchvision refuses unknown ones with a ValueError."""
    for split in splits[:-1]:
        try:
            return make(split=split)
        except ValueError as error:
            if "argument split" not in str(error):
                raise
    return make(split=splits[-1])


def _class_names(dataset: Any) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if names:
        return [name if isinstance(name, str) else str(name[0]) for name in names]
    labels = getattr(dataset, "targets", None)
    labels = getattr(dataset, "labels", None) if labels is None else labels
    if labels is None:
        raise ValueError(f"source {type(dataset).__name__!r} names neither its classes nor its labels")
    return [str(label) for label in range(int(np.max(labels)) + 1)]
