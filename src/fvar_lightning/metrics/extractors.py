"""Frozen networks that turn images into features, one pass per image, and give the figures their names.

All take uint8 images (B, 3, H, W) and give `Features`. `to_uint8` makes such images from ours.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from fvar_lightning.data.pixels import to_uint8 as to_uint8
from fvar_lightning.tokenizer.efficientnet import EfficientNetLite

INCEPTION_SHA256 = "6726825d"
"""How the SHA-256 of the Inception weights of the literature begins (torch-fidelity's and pytorch-fid's file)."""


class Features(NamedTuple):
    """What an extractor sees in a batch of images."""

    features: Tensor
    """(B, D) float32."""
    logits: Tensor | None
    """(B, C) float32 class logits, for the Inception Score; ``None`` if the network has none."""


class FeatureExtractor(nn.Module):
    """Base of the extractors: frozen, in evaluation mode always, float32 even under autocast.

    Subclasses implement `extract`.

    Attributes:
        name: what the figures are named after; statistics of another name are refused.
        num_features: D.
    """

    def __init__(self, name: str, num_features: int) -> None:
        super().__init__()
        self.name = name
        self.num_features = num_features

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in evaluation mode, whatever its parent does."""
        return super().train(False)

    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W), any size.

        Raises:
            ValueError: for images that are not uint8 with three channels.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 (B, 3, H, W) (see to_uint8), got {images.dtype} {tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            features, logits = self.extract(images)
        if features.shape != (len(images), self.num_features):
            raise ValueError(
                f"{self.name}: expected features {(len(images), self.num_features)}, got {tuple(features.shape)}"
            )
        return Features(features.float(), None if logits is None else logits.float())


class Inception(FeatureExtractor):
    """Inception-v3 as FID was defined with: torch-fidelity's port with TensorFlow's bilinear resize to 299 px.

    The features are the 2048 of the last pooling, the logits those without bias, as torch-fidelity takes them.

    Args:
        weights: path of ``weights-inception-2015-12-05-6726825d.pth``; ``None`` takes it from torch's hub folder and
            downloads it there if it is missing.
        sha256: how the SHA-256 of the file must begin. Another value is for weights of your own; the figures are
            then named ``inception_<sha256>``.

    Raises:
        ValueError: the file does not exist, is truncated, or is another one.
        FileNotFoundError: no `weights` were given and the download failed.
    """

    def __init__(self, weights: str | Path | None = None, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__("inception" if sha256 == INCEPTION_SHA256 else f"inception_{sha256[:8]}", 2048)
        path = _downloaded_inception() if weights is None else Path(weights)
        # torch-fidelity would un-pickle the file without weights_only: it gets a copy of the tensors we loaded safely
        copy = io.BytesIO()
        torch.save(_checked_inception(path, sha256), copy)
        copy.seek(0)
        self.net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
        self.requires_grad_(False)
        self.train(False)

    def extract(self, images: Tensor) -> Features:
        """See the base class."""
        return Features(*self.net(images))


def _downloaded_inception() -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the Inception weights could not be downloaded ({error}). Fetch {URL_INCEPTION_V3} elsewhere and give "
                f"its path as `weights`, or put it at {path}; EfficientNetLite0 needs no download"
            ) from error
    return path


def _checked_inception(path: Path, sha256: str) -> dict[str, Tensor]:
    source = f"the Inception weights of {URL_INCEPTION_V3} (SHA-256 {sha256}...)"
    if not path.is_file():
        raise ValueError(f"weights must be {source}, but there is no file {path}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(sha256):
        raise ValueError(
            f"weights must be {source}; {path} ({len(content)} bytes, SHA-256 {digest[:8]}...) "
            "is another file or a truncated one"
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights must be {source}; {path} holds no state dict: {error}") from error


CACHED_IMAGES = 4
"""Whose maps the cache of a CPU holds: twice as fast as a batch of 48."""


class EfficientNetLite0(FeatureExtractor):
    """EfficientNet-Lite0 with the weights of its Python package: works offline; its figures compare among themselves.

    Images are resized to 224 x 224, bicubic with antialiasing, clamped to 0..255 and normalised as the network was
    trained: (pixel - 127) / 128. The features are the 1280 of the last pooling.
    """

    def __init__(self) -> None:
        super().__init__("efficientnet_lite0", EfficientNetLite.num_features)
        self.net = EfficientNetLite("lite0")

    def extract(self, images: Tensor) -> Features:
        """See the base class."""
        if images.device.type != "cpu":
            return self._extract(images)
        pieces = [self._extract(piece) for piece in images.split(CACHED_IMAGES)]
        return Features(*(torch.cat(part) for part in zip(*pieces, strict=True)))

    def _extract(self, images: Tensor) -> Features:
        x = images.float()
        if x.shape[-2:] != (self.net.image_size, self.net.image_size):
            size = (self.net.image_size, self.net.image_size)
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        return Features(*self.net(x / 127.5 - 1))


class ModuleExtractor(FeatureExtractor):
    """Any module as an extractor.

    Args:
        module: maps uint8 images (B, 3, H, W) to features (B, D) or to a pair of features and logits. It is frozen.
        name: what the figures are named after.
        num_features: D.

    Raises:
        ValueError: a name the figures of the literature are known by, or none.
    """

    def __init__(self, module: nn.Module, name: str, num_features: int) -> None:
        if not name or name.startswith("inception"):
            raise ValueError(
                f"name must be a name of your own, not {name!r}: 'inception' marks the literature's figures"
            )
        super().__init__(name, num_features)
        self.net = module
        self.requires_grad_(False)
        self.train(False)

    def extract(self, images: Tensor) -> Features:
        """See the base class."""
        out = self.net(images)
        return Features(out, None) if isinstance(out, Tensor) else Features(*out)
