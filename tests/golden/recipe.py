"""Networks, weights, inputs and runs of the parity tests: what the official code and ours are both given.

Everything random comes from the raw bits of PCG64, a stream NumPy promises never to change, keyed by name: the tests
rebuild it exactly, and the golden files need hold only the official code's answers.
"""

import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DERIVED = ("lvl_1L", "attn_bias_for_masking", "quantize.ema_vocab_hit_SV", "zero_k_bias")
"""What official files hold beside weights; the recipe leaves it as the official constructors make it."""

EMBEDDINGS = ("class_emb", "lvl_embed", "pos_", "quantize.embedding")


class Config(NamedTuple):
    """Sizes by official VAR's names; share_quant_resi 0: one phi per scale, 1: a single one, n: n of them."""

    patch_nums: tuple[int, ...]
    vocab_size: int
    z_channels: int
    ch: int
    share_quant_resi: int
    num_classes: int
    depth: int
    width: int
    heads: int
    shared_aln: bool
    attn_l2_norm: bool


CONFIGS = {
    "256px": Config((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 256, 16, 32, 4, 10, 2, 128, 2, False, True),
    "512px": Config((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 64, 8, 32, 4, 1000, 2, 128, 2, True, True),
    "own_phis": Config((1, 2, 3, 4, 6, 8), 128, 8, 32, 0, 5, 3, 192, 3, True, True),
    "plain_attention": Config((1, 2, 3, 5), 96, 4, 32, 1, 1, 2, 64, 1, False, False),
    "plain_attention_shared_aln": Config((2, 3, 4), 64, 6, 32, 2, 3, 4, 128, 2, True, False),
    "fewer_scales_than_phis": Config((1, 2, 4), 64, 4, 32, 4, 10, 2, 64, 1, False, True),
    "four_own_phis": Config((1, 2, 4, 8), 300, 32, 64, 0, 100, 5, 320, 5, False, True),
}


class Run(NamedTuple):
    """One generation of a batch of two."""

    guidance: float = 1.5
    top_k: int = 0
    top_p: float = 0.0
    more_smooth: bool = False
    seeds_per_image: bool = False


RUNS = {
    "guidance_0": Run(guidance=0.0),
    "guidance_4": Run(guidance=4.0),
    "top_k": Run(top_k=20),
    "top_p": Run(top_p=0.9),
    "top_k_and_top_p": Run(guidance=4.0, top_k=40, top_p=0.8),
    "seeds_per_image": Run(top_k=40, top_p=0.96, seeds_per_image=True),
    "more_smooth": Run(top_k=40, top_p=0.96, more_smooth=True),
}
SEEDS = (11, 4)
"""Of the two images; a batch drawn from one generator has the first."""


def runs(config: str) -> dict[str, Run]:
    """The generations of a configuration; few at 512 px, where each takes seconds."""
    few = ("top_k_and_top_p", "seeds_per_image")
    return {name: run for name, run in RUNS.items() if config != "512px" or name in few}


def labels(config: Config) -> Tensor:
    """(2,): the last class, and the null class."""
    return torch.tensor([config.num_classes - 1, config.num_classes])


def uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    """Zero mean, unit variance, float32."""
    bits = np.random.PCG64(zlib.crc32(key.encode())).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(11)).astype(np.float64) / 2**53
    return torch.from_numpy(((2 * unit - 1) * math.sqrt(3)).astype(np.float32).reshape(shape))


def weights(config: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A weight for each official name: scales at which tokens, classes and guidance make a difference."""
    filled = {}
    for name, shape in shapes.items():
        x = uniform(f"{config}/{name}", shape)
        if "norm" in name and name.endswith("weight"):
            filled[name] = 1 + 0.2 * x
        elif name.endswith("scale_mul_1H11"):
            # around the greatest temperature, log 100: some are clamped
            filled[name] = math.log(100) - 1 + x
        elif name.endswith("bias"):
            filled[name] = 0.1 * x
        elif name.startswith(EMBEDDINGS) or name.endswith("ada_gss"):
            filled[name] = 0.7 * x
        else:
            gain = 0.4 if name == "decoder.conv_out.weight" else 1.0
            filled[name] = gain / math.sqrt(math.prod(shape[1:])) * x
    return filled


def images(config: str) -> Tensor:
    """Two images of structure at all scales, (2, 3, H, W) in [-1, 1]."""
    side = 16 * CONFIGS[config].patch_nums[-1]
    x = sum(
        torch.nn.functional.interpolate(uniform(f"{config}/images/{n}", (2, 3, n, n)), (side, side)) / math.sqrt(3)
        for n in (1, 4, 16)
    )
    return x / 3


def probe(x: Tensor, points: int = 32) -> np.ndarray:
    """A tensor in few numbers: values at evenly spread places, then the means of as many stretches, which together
    cover every element."""
    flat = x.detach().flatten().double().numpy()
    spread = np.linspace(0, len(flat) - 1, points).round().astype(int)
    means = [stretch.mean() for stretch in np.array_split(flat, points)]
    return np.concatenate((flat[spread], means)).astype(np.float32)


def digest(tokens: Tensor) -> np.uint32:
    """A checksum of token maps."""
    return np.uint32(zlib.crc32(tokens.to(torch.int32).numpy().tobytes()))


def noise_digest() -> np.uint32:
    """A checksum of what this machine's torch draws: the same seed gives other noise where torch is built otherwise."""
    noise = torch.empty(4096).exponential_(generator=torch.Generator().manual_seed(SEEDS[0]))
    return np.uint32(zlib.crc32(noise.numpy().tobytes()))
