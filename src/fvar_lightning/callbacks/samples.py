"""SampleFolder: generated images on disk, with what they were made of, in a form that an interrupted run continues.

samples.json                        settings, hash of the checkpoint, versions; written first
<label>_<class>/<seed>.png          one file for each image, there whole or not at all
samples.npz                         arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,) labels, as the ADM suite reads it
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fvar_lightning.atomic import file_name, replacing, write_json
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.data.tokens import disagreements

PNG_END = b"IEND\xaeB`\x82"
ORDER_SEED = 0


class Sample(NamedTuple):
    """An image that is, or is to be, in the folder."""

    label: int
    seed: int


class SampleFolder:
    """The images that `fvar predict` makes.

    Args:
        root: is made by `claim`.
        class_names: name of every label.
    """

    def __init__(self, root: str | Path, class_names: Sequence[str]) -> None:
        self.root = Path(root)
        self.class_folders = [f"{label:04d}_{file_name(name)}" for label, name in enumerate(class_names)]

    @property
    def npz(self) -> Path:
        """Where `pack` writes to."""
        return self.root / "samples.npz"

    def path(self, sample: Sample) -> Path:
        """Of an image."""
        return self.root / self.class_folders[sample.label] / f"{sample.seed:06d}.png"

    def claim(self, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Note the settings in a folder without images, or make sure that the images in it were made with the same.

        Args:
            settings: decide what an image looks like, or which there are.
            about: is noted, but may change.

        Raises:
            ValueError: if the folder holds images made with other settings, or with unknown ones.
        """
        note = self.root / "samples.json"
        wanted = json.loads(json.dumps(settings))
        if not self.npz.exists() and next(self.root.glob("*/*.png"), None) is None:
            write_json(note, {"settings": wanted, **about})
        elif note.is_file():
            try:
                found = json.loads(note.read_text())["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{note} cannot be read ({error!r}); give another folder, or remove it") from error
            if differing := disagreements(found, wanted):
                raise ValueError(
                    f"folder {str(self.root)!r} holds images made with {differing}: give another folder, or remove it"
                )
        else:
            raise ValueError(
                f"folder {str(self.root)!r} holds images, but no samples.json that tells how they were made: "
                "give another folder, or remove it"
            )
        for left_over in (*self.root.glob("*.partial"), *self.root.glob("*/*.partial")):
            left_over.unlink(missing_ok=True)

    def finished(self, samples: Iterable[Sample]) -> list[Sample]:
        """Those whose file is there, to its last byte; all of them if they are packed."""
        if self.npz.is_file():
            return list(samples)
        return [sample for sample in samples if _is_whole(self.path(sample))]

    def write(self, image: Tensor, sample: Sample) -> None:
        """(3, H, W) in [-1, 1] -> an 8-bit PNG."""
        self._save(to_uint8(image).permute(1, 2, 0).cpu().numpy(), sample)

    def _save(self, pixels: np.ndarray, sample: Sample) -> None:
        with replacing(self.path(sample)) as beside:
            Image.fromarray(pixels).save(beside, format="PNG")

    def pack(self, samples: Sequence[Sample], progress: Callable[[Sequence[Any]], Iterable[Any]]) -> None:
        """Write the images into `npz`, one at a time.

        In a fixed random order: the suite computes the Inception Score of consecutive parts, which must not be of few
        classes each.

        Args:
            samples: all of them must be there.
            progress: wraps what takes long.
        """
        shuffled = _shuffled(samples)
        shape = _pixels(self.path(shuffled[0])).shape
        with replacing(self.npz) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for sample in progress(shuffled):
                    file.write(_pixels(self.path(sample)).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array([sample.label for sample in shuffled], dtype=np.int64))

    def unpack(self, samples: Sequence[Sample], progress: Callable[[Sequence[Any]], Iterable[Any]]) -> None:
        """Write the pictures that `npz` holds and are not there, one at a time.

        Args:
            samples: those that were packed.
            progress: wraps what takes long.
        """
        missing = {sample for sample in samples if not _is_whole(self.path(sample))}
        if not missing:
            return
        with zipfile.ZipFile(self.npz) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            (_, *shape), _, _ = np.lib.format.read_array_header_1_0(file)
            for sample in progress(_shuffled(samples)):
                pixels = np.frombuffer(file.read(math.prod(shape)), dtype=np.uint8)
                if sample in missing:
                    self._save(pixels.reshape(shape), sample)

    def remove_pictures(self, samples: Iterable[Sample]) -> None:
        """Once they are packed."""
        for sample in samples:
            self.path(sample).unlink(missing_ok=True)
        for name in self.class_folders:
            folder = self.root / name
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """In the order of `npz`."""
    return [samples[i] for i in np.random.default_rng(ORDER_SEED).permutation(len(samples))]


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError:  # missing, or shorter than that
        return False


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
