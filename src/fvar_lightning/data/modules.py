"""ImageDataModule: images and their views on the training device. TokenDataModule: cached tokens."""

import copy
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from torch.utils.data import DataLoader

from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.data.datasets import FolderDataset, ImageDataset, scan_folder
from fvar_lightning.data.images import ImageTransform
from fvar_lightning.data.loaders import Passes, SharedLoaders
from fvar_lightning.data.photographs import PHOTOGRAPHS, PhotographDataset
from fvar_lightning.data.pixels import to_unit_range
from fvar_lightning.data.tokens import TokenDataset
from fvar_lightning.data.torchvision_sets import TorchvisionDataset, load_torchvision
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.precision import no_autocast
from fvar_lightning.schedule import FocusSchedule


class _Source(NamedTuple):
    class_names: list[str]
    train: Any
    val: Any


class ImageDataModule(SharedLoaders):
    """Images, and their views made on the training device.

    Batches are `ImageBatch`es; those of `predict_dataloader` with `predict="samples"` are `SampleBatch`es.

    Args:
        source: `photographs`: those bundled with scikit-image; a folder of class folders or of images, with `train`
            and `val` folders in it or not; or, if `root` is given, the name of a torchvision data set.
        root: folder of the torchvision data set.
        image_size: side of the images in pixels; must be that of the schedule.
        schedule: scales and focus states.
        psf: point-spread function, see `Refocus`.
        batch_size: images per device and step.
        resize: `var` or `adm`, see `ImageTransform`. Photographs have their own: random crops at random zooms.
        random_crop: train on random crops; validation takes the centre.
        flip: mirror half of the training images.
        num_workers: processes that decode; by default up to 8 with a GPU, without one 0 to 2.
        val_fraction: part of the data held out for validation, where the source has no such part of its own.
        crops_per_photograph: samples of every photograph in an epoch.
        max_unreadable: so many images may be unreadable; by default 1 %, at least 10.
        download: let torchvision download what is missing; one process does, the others wait for it.
        seed: of the order of the training images and of their crops.
        predict: `samples`: asks for images to be generated; `tokens`: the training images in order, for token caches.
        samples_per_class: images to generate of every class.
        base_seed: seed of the first of them; the others count on.
        crops_per_image: passes over the training images for `predict="tokens"`, each with other crops.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        source: str = "photographs",
        root: str | None = None,
        image_size: int = 256,
        schedule: FocusSchedule = FocusSchedule(),  # noqa: B008  (frozen)
        psf: str = "disk",
        batch_size: int = 16,
        resize: Literal["var", "adm"] = "var",
        random_crop: bool = True,
        flip: bool = False,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        crops_per_photograph: int = 256,
        max_unreadable: int | None = None,
        download: bool = False,
        seed: int = 0,
        predict: Literal["samples", "tokens"] = "samples",
        samples_per_class: int = 8,
        base_seed: int = 0,
        crops_per_image: int = 1,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, samples_per_class, base_seed)
        if schedule.image_size != image_size:
            raise ValueError(
                f"image_size must be the last of patch_nums times patch_size: {schedule.patch_nums[-1]} * "
                f"{schedule.patch_size} = {schedule.image_size}, got {image_size}"
            )
        if predict not in ("samples", "tokens"):
            raise ValueError(f"predict must be 'samples' or 'tokens', got {predict!r}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
        if crops_per_image < 1:
            raise ValueError(f"crops_per_image must be positive, got {crops_per_image}")
        if crops_per_photograph < 1:
            raise ValueError(f"crops_per_photograph must be positive, got {crops_per_photograph}")
        self.source = source
        self.root = root
        self.schedule, self.psf = schedule, psf
        self.transform = ImageTransform(image_size, resize, random_crop, flip)
        self.val_fraction = val_fraction
        self.crops_per_photograph = crops_per_photograph
        self.max_unreadable = max_unreadable
        self.download = download
        self.predict = predict
        self.crops_per_image = crops_per_image
        self.refocus = Refocus(schedule, psf)

    @cached_property
    def _data(self) -> _Source:
        """Class names and both parts; scanned when first asked for."""
        options: dict[str, Any] = {"seed": self.seed, "max_unreadable": self.max_unreadable}
        transforms = self.transform, replace(self.transform, random_crop=False, flip=False)
        if self.root is not None:
            names, *parts = load_torchvision(self.source, self.root, self.val_fraction, self.download)
            made: list[Any] = [
                TorchvisionDataset(wrapped, names, transform, indices, **options)
                for (wrapped, indices), transform in zip(parts, transforms, strict=True)
            ]
            return _Source(names, *made)
        if self.source == "photographs":
            count = self.crops_per_photograph, max(1, round(self.val_fraction * self.crops_per_photograph))
            size = self.transform.size
            return _Source(
                list(PHOTOGRAPHS),
                PhotographDataset(size, count[0], flip=self.transform.flip, seed=self.seed),
                PhotographDataset(size, count[1], seed=self.seed, validation=True),
            )
        if not Path(self.source).expanduser().is_dir():
            hint = "; root must tell where it lies" if self.source in torchvision.datasets.__all__ else ""
            raise ValueError(
                "source must be 'photographs', an existing folder, or with root a torchvision data set, "
                f"got {self.source!r}{hint}"
            )
        names, *lists = scan_folder(self.source, self.val_fraction)
        made = [
            FolderDataset(images, names, transform, **options)
            for images, transform in zip(lists, transforms, strict=True)
        ]
        return _Source(names, *made)

    @property
    def class_names(self) -> list[str]:
        """Name of every label: class folders, the data set's own, or the photographs'."""
        return self._data.class_names

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self._data.train)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.eval_loader(self._data.val) if len(self._data.val) else []

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation images."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.predict == "samples":
            return self.sample_loader()
        train = self._data.train
        return self.eval_loader(Passes(train, len(train), self.crops_per_image))

    def real_images(self, part: Literal["train", "val"]) -> Any:
        """The images that generated ones are compared with: each of the part once, cropped as for validation."""
        dataset = copy.copy(self._data.train if part == "train" else self._data.val)
        if isinstance(dataset, ImageDataset):
            dataset.transform = replace(dataset.transform, random_crop=False, flip=False)
        else:
            dataset.flip = False
        return dataset

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """[uint8 pixels (B, 3, H, W), labels (B,)] -> `ImageBatch` in float32; anything else as it is."""
        if not isinstance(batch, list):
            return batch
        pixels, labels = batch
        with torch.no_grad(), no_autocast(pixels):
            images = to_unit_range(pixels)
            blurred = self.refocus.blur(images)
            return ImageBatch(images, labels, self.refocus.views(images, blurred), blurred)

    def teardown(self, stage: str) -> None:
        """Reports the images that could not be read."""
        if "_data" not in self.__dict__:
            return
        for part, dataset in (("training", self._data.train), ("validation", self._data.val)):
            if isinstance(dataset, ImageDataset) and dataset.num_unreadable:
                warnings.warn(f"unreadable {part} images, replaced by others: {dataset.report()}", stacklevel=2)


class TokenDataModule(SharedLoaders):
    """Batches of cached tokens (`TokenBatch`), and for prediction images to generate (`SampleBatch`).

    Args:
        path: folder of the cache of training tokens.
        val_path: folder of another one for validation; None for no validation.
        batch_size: rows per device and step.
        num_workers: processes that read; as for `ImageDataModule`.
        seed: of the order of the rows.
        samples_per_class: images to generate of every class.
        base_seed: seed of the first of them; the others count on.

    Raises:
        ValueError: if a cache is missing, incomplete or broken, or the two do not match.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        samples_per_class: int = 8,
        base_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, samples_per_class, base_seed)
        self.train = TokenDataset(path)
        self.val = None if val_path is None else TokenDataset(val_path)
        if self.val is not None:
            ours, theirs = (replace(part.meta, crops_per_image=1) for part in (self.train, self.val))
            if ours != theirs:
                raise ValueError(f"val_path {val_path!r} does not match path {path!r}: {theirs} against {ours}")

    @property
    def class_names(self) -> list[str]:
        """Name of every label, as the cache tells."""
        return self.train.meta.class_names

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.train, self.train.collate)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return [] if self.val is None else self.eval_loader(self.val, self.val.collate)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation tokens."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.sample_loader()
