"""Losses of tokenizer training: pixels, texture, frozen features, and a discriminator."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fvar_lightning.tokenizer.efficientnet import STAGE_CHANNELS, EfficientNetLite
from fvar_lightning.tokenizer.lpips import load_lpips

Perceptual = Literal["none", "efficientnet_lite1", "lpips"]
Discriminator = Literal["patch", "efficientnet_lite1"]


def pixel_loss(reconstruction: Tensor, target: Tensor, l1: float, l2: float) -> Tensor:
    """l1 * mean |x - y| + l2 * mean (x - y)^2 over all elements, a scalar."""
    return l1 * F.l1_loss(reconstruction, target) + l2 * F.mse_loss(reconstruction, target)


TEXTURE_WINDOW = 8
"""Side of the window of `texture_loss`, pixels."""


def texture_loss(reconstruction: Tensor, target: Tensor, octaves: int = 0) -> Tensor:
    """Mean |difference| of the local contrast of fine detail, a scalar.

    Detail is what an image's 3x3 mean leaves, contrast its root mean square per channel in 8x8 windows, 4 px apart. A
    pixel loss is least where texture that the codes cannot place is left out; this one asks for as much of it as the
    target has, wherever it comes to lie.

    Args:
        reconstruction, target: (B, C, H, W), H and W at least 8 * 2^octaves.
        octaves: how many times both are averaged to half the size and compared anew, which is summed: detail that is
            twice, four times, ... as coarse.
    """
    loss = F.l1_loss(_contrast(reconstruction), _contrast(target))
    for _ in range(octaves):
        reconstruction, target = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(target, 2)
        loss = loss + F.l1_loss(_contrast(reconstruction), _contrast(target))
    return loss


def _contrast(images: Tensor) -> Tensor:
    detail = images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    power = F.avg_pool2d(detail.square(), TEXTURE_WINDOW, TEXTURE_WINDOW // 2)
    # the root has no gradient at 0
    return (power + 1e-5).sqrt()


class FeatureLoss(nn.Module):
    """Mean squared distance of unit-length features at five depths of EfficientNet-Lite1 (ImageNet, offline).

    LPIPS without its learned channel weights (Zhang et al. 2018, eq. 1). The metrics use Lite0, another network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite("lite1")

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) each, in [-1, 1] -> scalar."""
        with torch.no_grad():
            wanted = self.network.stages(target)
        found = self.network.stages(reconstruction)
        terms = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
            for x, y in zip(found, wanted, strict=True)
        ]
        return torch.stack(terms).sum()


class LPIPSLoss(nn.Module):
    """LPIPS on VGG16 (Zhang et al. 2018). The metric's network alone: the metric keeps every value it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_lpips("vgg").net

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) each, in [-1, 1] -> scalar."""
        return self.network(reconstruction, target).mean()


def perceptual_loss(kind: Perceptual) -> nn.Module:
    """The network a perceptual loss compares with, frozen: (B, 3, H, W) in [-1, 1], twice -> scalar.

    ``lpips`` is that of torchmetrics on VGG16, whose ImageNet weights torchvision looks for in its cache
    (``$TORCH_HOME/hub/checkpoints/vgg16-397923af.pth``) and downloads where it may.

    Raises:
        ValueError: if `kind` names no network, or the weights are missing and cannot be downloaded, truncated, or of
            another network.
    """
    if kind == "efficientnet_lite1":
        return FeatureLoss()
    if kind != "lpips":
        raise ValueError(f"perceptual must be 'efficientnet_lite1' or 'lpips' for a loss, got {kind!r}")
    try:
        return LPIPSLoss()
    except ValueError as error:
        raise ValueError(
            f"perceptual 'lpips': {error}; or use 'efficientnet_lite1', which comes as a package"
        ) from error


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): (B, 3, H, W) -> one map (B, 1, about H / 2^layers, ...) of scores, high for real.

    Args:
        ch: width of the first layer, doubling with each.
        layers: stride-2 convolutions.
    """

    def __init__(self, ch: int = 64, layers: int = 3) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers):
            wide = ch * 2**i
            body += [nn.Conv2d(wide // 2, wide, 4, 2, 1), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(ch * 2 ** (layers - 1), 1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body(images)]


class FeatureDiscriminator(nn.Module):
    """Judges frozen features instead of pixels (Projected GAN, Sauer et al. 2021).

    A small head on each of five stages of EfficientNet-Lite1: (B, 3, H, W) in [-1, 1] -> five maps of scores, high for
    real, at strides 2 to 32. Only the heads are trained and saved.

    Args:
        ch: width of the heads.
    """

    def __init__(self, ch: int = 64) -> None:
        super().__init__()
        # in a tuple: neither trained nor saved
        self._network = (EfficientNetLite("lite1"),)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, ch, 1), nn.LeakyReLU(0.2), nn.Conv2d(ch, 1, 3, 1, 1))
            for channels in STAGE_CHANNELS
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self._network[0].to(images.device).stages(images)
        # every place of length sqrt(C), as the heads' initialisation expects
        pairs = zip(self.heads, maps, strict=True)
        return [head(F.normalize(x, dim=1) * x.shape[1] ** 0.5) for head, x in pairs]


def build_discriminator(kind: Discriminator, ch: int) -> PatchDiscriminator | FeatureDiscriminator:
    """A discriminator by its name."""
    return PatchDiscriminator(ch) if kind == "patch" else FeatureDiscriminator(ch)


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss, the mean over the maps of scores; trains the discriminator alone."""
    pairs = zip(discriminator(real.detach()), discriminator(fake.detach()), strict=True)
    return torch.stack([0.5 * (F.relu(1 - x).mean() + F.relu(1 + y).mean()) for x, y in pairs]).mean()


def generator_loss(discriminator: nn.Module, fake: Tensor) -> Tensor:
    """Minus the mean score; reaches the images, never the discriminator's weights."""
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    return -torch.stack([x.mean() for x in functional_call(discriminator, fixed, fake)]).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1.0) -> Tensor:
    """The weight that gives both losses the same gradient at the decoder's last layer, at most `most` (VQGAN, eq. 7).

    Args:
        reconstruction, adversarial: scalars that depend on `last_layer`.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-6)).clamp(0, most).detach()
