"""Statistics of a set of images in the feature space of one extractor: summed over batches and ranks, kept in files.

Legend: N images, D features, C classes.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fvar_lightning.atomic import file_name, replacing


@dataclass(eq=False)  # not frozen: torchmetrics refuses to pass on such results
class Statistics:
    """Mean and covariance of a set's features, and the features themselves where they were kept."""

    extractor: str
    """Name of the extractor."""
    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, normalised by N - 1."""
    count: int | None
    """N; ``None`` where the file does not tell (the ADM reference batches)."""
    image_size: int | None = None
    """Side of the images in pixels, where it is known."""
    features: Tensor | None = None
    """(N, D) float32: kernel distance, precision and recall need them."""
    logits: Tensor | None = None
    """(N, C) float32: the Inception Score needs them."""

    def save(self, path: str | Path) -> None:
        """Writes an .npz, atomically."""
        arrays = {"extractor": np.array(self.extractor), "mu": _array(self.mean), "sigma": _array(self.covariance)}
        for name in ("count", "image_size"):
            if (value := getattr(self, name)) is not None:
                arrays[name] = np.array(value)
        for name in ("features", "logits"):
            if (tensor := getattr(self, name)) is not None:
                arrays[name] = _array(tensor)
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs take keywords for allow_pickle

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> "Statistics":
        """Reads what `save` wrote, or a reference batch of the ADM suite (``mu``, ``sigma``, ``arr_0``).

        The statistics of an ADM batch are Inception's. They hold no features, and `arr_0` are fewer images than `mu`
        and `sigma` were computed of; pass `adm_images` through the extractor for precision, recall and KID.

        Raises:
            ValueError: naming the file, if it is neither.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                small = {name: file[name] for name in file.files if name != "arr_0"}
                adm = "arr_0" in file.files
            mean, covariance = (torch.from_numpy(small[k]).to(device, torch.float64) for k in ("mu", "sigma"))
            extractor = "inception" if adm else str(small["extractor"])
            shape = _shape(path, "arr_0") if adm else ()
        except (KeyError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no feature statistics (keys extractor, mu, sigma): {error}") from error
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path}: sigma must be {(len(mean), len(mean))} for its mu, got {tuple(covariance.shape)}"
            )
        return cls(
            extractor,
            mean,
            covariance,
            count=int(small["count"]) if "count" in small else None,
            image_size=shape[1] if adm else int(small["image_size"]) if "image_size" in small else None,
            features=torch.from_numpy(small["features"]).to(device) if "features" in small else None,
            logits=torch.from_numpy(small["logits"]).to(device) if "logits" in small else None,
        )


def adm_images(path: str | Path) -> np.ndarray:
    """The images of an ADM reference batch or sample file: uint8 (N, H, W, 3).

    Raises:
        ValueError: if the file holds no images of that suite.
    """
    with np.load(path, allow_pickle=False) as file:
        if "arr_0" not in file.files:
            raise ValueError(f"{path} is no batch of the ADM suite: it has {file.files}, not arr_0")
        return file["arr_0"]


def statistics_file(folder: str | Path, dataset: str, extractor: str, image_size: int) -> Path:
    """Where the statistics of a data set are cached: one file for data set, extractor and resolution."""
    return Path(folder, f"{file_name(dataset)}-{extractor}-{image_size}.npz")


def _shape(path: str | Path, name: str) -> tuple[int, ...]:
    """Shape of one array of an .npz from its header: the images of a reference batch are 2 GB."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


class FeatureStatistics(Metric):
    """Sums features of images over batches and ranks; holds no extractor, so that none ends up in a checkpoint.

    ``statistics.update(*extractor(images))`` passes every image through the extractor once for all figures. A rank
    that has no images updates once with an empty batch, so that all ranks have features to gather.

    Args:
        extractor: its name.
        num_features: D.
        image_size: side of the images in pixels, kept to compare equals with equals.
        keep_features: keeps features and logits (4 (D + C) bytes an image: 0.6 GB for 50 000 images and Inception),
            which kernel distance, precision, recall and Inception Score need. The Frechet distance needs sums alone.

    Raises:
        ValueError: for fewer than two features.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    outer: Tensor
    count: Tensor
    features: list[Tensor]
    logits: list[Tensor]

    def __init__(
        self, extractor: str, num_features: int, image_size: int | None = None, keep_features: bool = True, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        if num_features < 2:
            raise ValueError(f"num_features must be at least 2, got {num_features}")
        self.extractor = extractor
        self.image_size = image_size
        self.keep_features = keep_features
        # float64: the covariance is a small difference of large sums
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, logits: Tensor | None = None) -> None:
        """Adds features (B, D) and, where the extractor has them, logits (B, C).

        Raises:
            ValueError: for features of another width.
        """
        if features.dim() != 2 or features.shape[1] != len(self.total):
            raise ValueError(f"features must be (B, {len(self.total)}), got {tuple(features.shape)}")
        x = features.double()
        self.total += x.sum(0)
        self.outer += x.T @ x
        self.count += len(x)
        if self.keep_features:
            self.features.append(features)
            if logits is not None:
                self.logits.append(logits)

    def compute(self) -> Statistics:
        """Statistics of all images of all ranks.

        Raises:
            ValueError: for fewer than two images.
        """
        count = int(self.count)
        if count < 2:
            raise ValueError(f"statistics need at least two images, got {count}")
        mean = self.total / count
        covariance = (self.outer - count * torch.outer(mean, mean)) / (count - 1)
        features, logits = (dim_zero_cat(s) if len(s) else None for s in (self.features, self.logits))
        return Statistics(self.extractor, mean, covariance, count, self.image_size, features, logits)
