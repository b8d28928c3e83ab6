"""The photographs that come with scikit-image: a data set that needs no download."""

import functools
from types import ModuleType

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fvar_lightning.data.images import to_tensor
from fvar_lightning.data.sampler import Draw

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "motorcycle",
    "retina",
    "rocket",
)
"""Colour photographs whose files are part of scikit-image itself; each is a class."""


def _skimage_data() -> ModuleType:
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            "source 'photographs' needs scikit-image: pip install 'fvar-lightning[demo]', or give a folder of images"
        ) from error
    return skimage.data


@functools.cache
def load_photograph(name: str) -> Image.Image:
    """RGB picture of a name in `PHOTOGRAPHS`. Decoded once in a process.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    data = _skimage_data()
    pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return Image.fromarray(pixels)


@functools.cache
def _reduced(name: str, size: int) -> Image.Image:
    """The photograph shrunk by whole boxes, half its shorter side still twice `size`: crops then cost a tenth."""
    image = load_photograph(name)
    return image.reduce(max(1, min(image.size) // (4 * size)))


class PhotographDataset(Dataset[tuple[Tensor, int]]):
    """Square crops of bundled photographs, of half to the whole shorter side, as (uint8 (3, size, size), label).

    A crop is at least `size` pixels where the photograph is, so that nothing is enlarged without need. Consecutive
    samples are of different photographs.

    Args:
        size: side of the result in pixels.
        crops_per_photograph: how many an epoch holds.
        flip: mirror half of the crops.
        seed: crops depend on (seed, epoch, index) alone.
        validation: other crops than those of training, of the same photographs, the same in every epoch.

    Raises:
        ImportError: without scikit-image.
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self, size: int, crops_per_photograph: int, *, flip: bool = False, seed: int = 0, validation: bool = False
    ) -> None:
        _skimage_data()
        if size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {size}")
        if crops_per_photograph < 1:
            raise ValueError(f"crops_per_photograph must be positive, got {crops_per_photograph}")
        self.size = size
        self.crops_per_photograph = crops_per_photograph
        self.flip = flip
        self.seed = seed
        self.validation = validation
        self.class_names = list(PHOTOGRAPHS)

    def __len__(self) -> int:
        return len(PHOTOGRAPHS) * self.crops_per_photograph

    def name(self, index: int) -> str:
        """The photograph of a sample."""
        return f"{PHOTOGRAPHS[index % len(PHOTOGRAPHS)]}, crop {index // len(PHOTOGRAPHS)}"

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, int]:
        """The crop of a draw; a plain index is a draw of epoch 0."""
        epoch, index = item if isinstance(item, Draw) else (0, item)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        label = index % len(PHOTOGRAPHS)
        image = _reduced(PHOTOGRAPHS[label], self.size)
        rng = np.random.default_rng((self.seed, 0 if self.validation else epoch, index, int(self.validation)))
        shorter = min(image.size)
        side = int(rng.integers(min(max(shorter // 2, self.size), shorter), shorter + 1))
        left, top = int(rng.integers(image.width - side + 1)), int(rng.integers(image.height - side + 1))
        crop = F.resized_crop(image, top, left, side, side, [self.size, self.size], InterpolationMode.LANCZOS)
        square = to_tensor(crop)
        return (square.flip(-1) if self.flip and rng.random() < 0.5 else square), label
