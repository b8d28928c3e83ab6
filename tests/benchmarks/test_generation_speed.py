"""Generation beside official VAR's own code: same weights, same images, float32, one thread, interleaved.

VAR_REPO=path/of/a/checkout pytest -m benchmark -s tests/benchmarks/test_generation_speed.py

Never slower is asserted, 1.25 times faster the aim. Official time over ours on 2026-11-22 (Xeon with AVX-512, without
AMX, torch 2.14.1, one thread; flash-attn and xformers, which the official code can use, are for GPUs):

| | two runs |
|---|---|
| small, 128 px, batch 16 | 1.39, 1.36 |
| depth 8, 256 px, batch 2 | 1.27, 1.21 |
| depth 8, 256 px, batch 4, guidance 4 | 1.30, 1.28 |
| depth 8, 256 px, batch 2, no guidance | 1.37 (one run) |

At batch 2 the decoder is 1.26 times faster (channels-last maps; up-sampling and convolution at once, without which it
would be 1.13), what comes before it 1.13 times (modulations once per sample, guidance before the classifier, a cache
allocated once, top-k before sorting). Four fifths of what is left are convolutions and matrix products.
"""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import NamedTuple

import pytest
import torch
from size import TINY
from torch import Tensor, nn

from fvar_lightning.generation.sampling import generate
from fvar_lightning.weights.official import load_var_checkpoint
from golden.official import build_official
from golden.recipe import DERIVED, Config, weights

VAR_REPO = os.environ.get("VAR_REPO")
SEED = 3

SMALL = Config((1, 2, 3, 4, 6, 8), 512, 16, 32, 4, 10, 4, 256, 4, False, True)
DEPTH_8 = Config((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 4096, 32, 160, 4, 1000, 8, 512, 8, False, True)


class Case(NamedTuple):
    """How many images of what are made, and how often."""

    config: Config
    batch: int
    guidance: float
    top_k: int
    top_p: float
    rounds: int


CASES = {
    "small, 128 px, batch 16": Case(SMALL, 16, 1.5, 0, 0.0, 7),
    "depth 8, 256 px, batch 2": Case(DEPTH_8, 2, 1.5, 900, 0.96, 3),
    "depth 8, 256 px, batch 4, guidance 4": Case(DEPTH_8, 4, 4.0, 900, 0.96, 3),
    "depth 8, 256 px, batch 2, no guidance": Case(DEPTH_8, 2, 0.0, 900, 0.96, 3),
}


def filled(network: nn.Module, name: str) -> nn.Module:
    """The network with weights by the parity tests' recipe."""
    state = network.state_dict()
    shapes = {key: tuple(x.shape) for key, x in state.items() if not key.endswith(DERIVED)}
    network.load_state_dict(state | weights(name, shapes))
    return network


def timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = process_time()
    images = make()
    return process_time() - start, images


@pytest.mark.benchmark
@pytest.mark.skipif(VAR_REPO is None, reason="VAR_REPO names no checkout of the official code")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", list(CASES)[:1] if TINY else CASES)
def test_never_slower_than_the_official_code(name: str, tmp_path: Path) -> None:
    config, batch, guidance, top_k, top_p, rounds = CASES[name]
    official_vae, official_var = (filled(network, "speed") for network in build_official(str(VAR_REPO), config))
    files = tmp_path / "vae.pth", tmp_path / "var.pth"
    for network, file in zip((official_vae, official_var), files, strict=True):
        torch.save(network.state_dict(), file)
    vae, var = load_var_checkpoint(*files)
    assert var is not None
    labels = torch.arange(batch) % config.num_classes

    def theirs() -> Tensor:
        images = official_var.autoregressive_infer_cfg(batch, labels, SEED, guidance, top_k, top_p)
        return images * 2 - 1

    def ours() -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return generate(var, vae, labels, guidance=guidance, top_k=top_k, top_p=top_p, generator=generator)

    torch.testing.assert_close(ours(), theirs(), rtol=0, atol=1e-4)
    pairs = [(timed(theirs)[0], timed(ours)[0]) for _ in range(1 if TINY else rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    spread = ", ".join(f"{a / b:.2f}" for a, b in pairs)
    seconds = [statistics.median(column) / batch for column in zip(*pairs, strict=True)]
    print(f"\n{name}: official {seconds[0]:.2f} s, ours {seconds[1]:.2f} s an image; ratio {ratio:.2f} ({spread})")
    assert TINY or ratio >= 1.0
