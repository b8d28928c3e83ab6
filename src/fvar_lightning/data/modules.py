"""ImageDataModule: images and their views on the training device."""

import copy
import warnings
from functools import cached_property
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.data.datasets import ImageDataset
from fvar_lightning.data.fingerprint import fingerprint
from fvar_lightning.data.hf import HFOptions
from fvar_lightning.data.images import ImageTransform
from fvar_lightning.data.loaders import Passes, SharedLoaders
from fvar_lightning.data.photographs import PhotographDataset
from fvar_lightning.data.pixels import to_unit_range
from fvar_lightning.data.sources import Source, SourceOptions, find_source
from fvar_lightning.data.streams import HFStream
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.precision import no_autocast
from fvar_lightning.schedule import FocusSchedule


class ImageDataModule(SharedLoaders):
    """Images, and their views made on the training device.

    Batches are `ImageBatch`es; those of `predict_dataloader` with `predict="samples"` are `SampleBatch`es.

    Args:
        source: `photographs`: those bundled with scikit-image; a folder of class folders or of images, with `train`
            and `val` folders in it or not; ``hf:`` and a data set of Hugging Face, on the hub or on disk (see
            `load_hf`); or, if `root` is given, the name of a torchvision data set.
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
        hf: columns and splits of a data set of Hugging Face, and whether it is streamed.
        seed: of the order of the training images and of their crops.
        predict: `samples`: asks for images to be generated; `tokens`: the images in order, for token caches.
        samples_per_class: images to generate of every class.
        base_seed: seed of the first of them; the others count on.
        part: of the images, `train` or `val`, for `predict="tokens"`.
        crops_per_image: passes over the training images for `predict="tokens"`, each with other crops; there is one
            over the validation images.

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
        hf: HFOptions = HFOptions(),  # noqa: B008  (frozen)
        seed: int = 0,
        predict: Literal["samples", "tokens"] = "samples",
        samples_per_class: int = 8,
        base_seed: int = 0,
        part: Literal["train", "val"] = "train",
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
        if part not in ("train", "val"):
            raise ValueError(f"part must be 'train' or 'val', got {part!r}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
        if crops_per_image < 1:
            raise ValueError(f"crops_per_image must be positive, got {crops_per_image}")
        if crops_per_photograph < 1:
            raise ValueError(f"crops_per_photograph must be positive, got {crops_per_photograph}")
        self.options = SourceOptions(
            source,
            ImageTransform(image_size, resize, random_crop, flip),
            root=root,
            val_fraction=val_fraction,
            crops_per_photograph=crops_per_photograph,
            max_unreadable=max_unreadable,
            download=download,
            seed=seed,
            hf=hf,
        )
        self.schedule, self.psf = schedule, psf
        self.predict = predict
        self.part = part
        self.crops_per_image = crops_per_image if part == "train" else 1
        self.refocus = Refocus(schedule, psf)

    def find_source(self) -> Source:
        """Class names and both parts. A subclass that reads data of another kind overrides this alone."""
        return find_source(self.options)

    @cached_property
    def _data(self) -> Source:
        """Searched for when first asked for."""
        return self.find_source()

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
        if isinstance(self._cached, HFStream):
            raise ValueError("predict 'tokens' needs images in order, a stream has none: hf.streaming must be false")
        if not len(self._cached):
            raise ValueError(f"part {self.part!r} holds no images, see val_fraction")
        transform = self.options.transform
        if self.crops_per_image > 1 and isinstance(self._cached, ImageDataset) and not transform.random:
            raise ValueError(f"crops_per_image must be 1 without random_crop and flip, got {self.crops_per_image}")
        return self.unfinished_loader(Passes(self._cached, len(self._cached), self.crops_per_image))

    @property
    def _cached(self) -> Any:
        """The images that token caches are made of."""
        return self._data.train if self.part == "train" else self._data.val

    def cached_images(self) -> dict[str, Any]:
        """Which images `predict="tokens"` asks for, as plain values: what a token cache notes of them."""
        return {
            "part": self.part,
            "crops_per_image": self.crops_per_image,
            "seed": self.seed,
            "fingerprint": fingerprint(self._cached),
        }

    def real_images(self, part: Literal["train", "val"]) -> Any:
        """The images that generated ones are compared with: each of the part once, cropped as for validation.

        Raises:
            ValueError: for the training part of a stream.
        """
        dataset = copy.copy(self._data.train if part == "train" else self._data.val)
        if isinstance(dataset, HFStream):
            raise ValueError(
                f"real {part!r} images of a stream cannot be counted out: compare with 'val', or give `reference`"
            )
        if isinstance(dataset, ImageDataset):
            dataset.transform = self.options.val_transform
        elif isinstance(dataset, PhotographDataset):
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
            if isinstance(dataset, ImageDataset | HFStream) and dataset.num_unreadable:
                warnings.warn(f"unreadable {part} images, replaced by others: {dataset.report()}", stacklevel=2)
