"""Encoder and Decoder: the convolutional autoencoder of VAR's VQVAE, with VAR's parameter names.

Legend: B batch, C channels, H x W pixels, Z latent channels, h x w = H/f x W/f latent cells, f = 2^(levels - 1).
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvar_lightning.activations import recomputed
from fvar_lightning.tokenizer.winograd import Conv3x3

VAR_CH_MULT = (1, 1, 2, 2, 4)

PIECE = 2**18
"""Values of a map whose squares are in memory at once: they stay in the cache."""


class GroupNorm(nn.GroupNorm):
    """torch's, but for channels-last maps on a CPU, of which torch sums the squares in one run of float32.

    At 512 px that run put a decoded image 1e-4 off.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(gcd(groups, channels), channels, eps=1e-6)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); `inplace` allows to overwrite x where no gradients are asked for."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if not (last and x.is_cpu and x.dtype == torch.float32) or torch.is_grad_enabled():
            return super().forward(x)
        mean = self._over_groups(x.mean((2, 3)))
        pieces = x.split(max(PIECE // x[:, :, 0].numel(), 1), dim=2)
        squares = torch.stack([(piece - mean).square_().sum((2, 3)) for piece in pieces]).sum(0)
        variance = self._over_groups(squares / x[0, 0].numel())
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None] - mean * scale, x, scale, out=x if inplace else None)

    def _over_groups(self, x: Tensor) -> Tensor:
        """Values per channel, (B, C), averaged over the groups: (B, C, 1, 1)."""
        mean = x.unflatten(1, (self.num_groups, -1)).mean(2)
        return mean.repeat_interleave(x.shape[1] // self.num_groups, 1)[..., None, None]


class ResnetBlock(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = recomputed(self._begin, x)
        h = recomputed(self._end, h)
        return h.add_(self.nin_shortcut(x))

    def _begin(self, x: Tensor) -> Tensor:
        return self.conv1(F.silu(self.norm1(x), inplace=True))

    def _end(self, h: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(h, inplace=True), inplace=True))


class AttnBlock(nn.Module):
    """Single-head self-attention over all cells of a map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b (h w) c", three=3)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Downsample2x(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._padded, x)

    def _padded(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2x(nn.Module):
    """Doubles the side: every cell four times, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not torch.is_grad_enabled() and x.shape[1:].numel() > self.conv.weight.numel():
            return self.at_once(x)
        return recomputed(self._enlarged, x)

    def _enlarged(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    def at_once(self, x: Tensor) -> Tensor:
        """The same by one transposed convolution of 4 x 4.

        An output pixel sees 2 x 2 different cells only, so that 4/9 of the multiplications do: measured to pay on CPUs
        where the map is larger than the kernel.
        """
        kernel = self.conv.weight
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where `attention`."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, groups: int, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * depth
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(depth if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    def __init__(self, in_channels: int, out_channels: int, depth: int, groups: int, last: bool) -> None:
        super().__init__(in_channels, out_channels, depth, groups, attention=last)
        self.downsample = nn.Identity() if last else Downsample2x(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(Level):
    def __init__(self, in_channels: int, out_channels: int, depth: int, groups: int, first: bool, last: bool) -> None:
        super().__init__(in_channels, out_channels, depth, groups, attention=first)
        self.upsample = nn.Identity() if last else Upsample2x(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class UpLevels(nn.ModuleList):
    """Levels, the first of which has the full size: run from the last, the coarsest, to it."""

    def forward(self, x: Tensor) -> Tensor:
        for level in reversed(self):
            x = level(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def initialise(network: nn.Module) -> None:
    """Convolutions that keep the variance, residual branches that begin at zero (Goyal et al. 2017, section 5.1).

    From torch's own initialisation small networks take several times the steps to the same reconstruction.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)


def laid_out(x: Tensor) -> Tensor:
    """Maps as a CPU convolves them a fifth faster, channels last, unless gradients are asked for."""
    if x.is_cpu and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


class Encoder(nn.Module):
    """(B, 3, H, W) images -> (B, Z, H/f, W/f) features.

    Args:
        ch: base width.
        ch_mult: width of every resolution as a multiple of `ch`; f = 2 ** (len(ch_mult) - 1).
        num_res_blocks: residual blocks per resolution.
        z_channels: Z.
        norm_groups: groups of the GroupNorms. Few channels want few: on a map of one cell a group of one or two
            channels is normalised to a constant or to signs.
    """

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int, norm_groups: int = 32
    ) -> None:
        super().__init__()
        widths = [ch * m for m in (1, *ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[i], widths[i + 1], num_res_blocks, norm_groups, last=i == last)
            for i in range(len(ch_mult))
        )
        self.mid = Middle(widths[-1], norm_groups)
        self.norm_out = GroupNorm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(laid_out(x))
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h)), inplace=True)).contiguous()


class Decoder(nn.Module):
    """(B, Z, h, w) features -> (B, 3, h f, w f) images; the arguments of `Encoder`, one residual block more."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int, norm_groups: int = 32
    ) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], norm_groups)
        self.up = UpLevels(
            UpLevel(widths[i + 1], widths[i], num_res_blocks + 1, norm_groups, first=i == last, last=i == 0)
            for i in range(len(ch_mult))
        )
        self.norm_out = GroupNorm(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        h = self.up(self.mid(self.conv_in(laid_out(z))))
        return self.conv_out(F.silu(self.norm_out(h, inplace=True), inplace=True)).contiguous()
