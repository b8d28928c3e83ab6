"""Write the golden files of the parity tests: what the official code answers to the recipe.

PYTHONPATH=tests python -m golden.make_golden PATH_OF_AN_OFFICIAL_CHECKOUT [CONFIGURATION ...]
"""

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from golden.official import official_by_recipe, official_modules, perturbed
from golden.recipe import CONFIGS, SEEDS, Run, digest, images, labels, noise_digest, probe, runs

ROUNDING = 1e-6


def drawn_tokens(repo: str, run: Run, var: nn.Module, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], and the token maps drawn on the way, (B, L)."""
    module = official_modules(repo)[1]
    draw = module.sample_with_top_k_top_p_
    drawn: list[Tensor] = []

    def recording(*args: object, **kwargs: object) -> Tensor:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    def generate(batch: Tensor, seed: int) -> Tensor:
        return var.autoregressive_infer_cfg(
            len(batch), batch, seed, run.guidance, run.top_k, run.top_p, run.more_smooth
        )

    module.sample_with_top_k_top_p_ = recording
    try:
        if not run.seeds_per_image:
            made = generate(wanted, SEEDS[0])
            return made * 2 - 1, torch.cat(drawn, dim=1)[..., 0]
        made, tokens = [], []
        for i, seed in enumerate(SEEDS):
            drawn.clear()
            made.append(generate(wanted[i : i + 1], seed))
            tokens.append(torch.cat(drawn, dim=1)[..., 0])
        return torch.cat(made) * 2 - 1, torch.cat(tokens)
    finally:
        module.sample_with_top_k_top_p_ = draw


def names_digest(shapes: Mapping[str, tuple[int, ...]]) -> np.uint32:
    """A checksum of all names and shapes of a state dictionary."""
    return np.uint32(zlib.crc32(repr(sorted(shapes.items())).encode()))


@torch.no_grad()
def answers(repo: str, config: str, rounding: float = 0.0) -> dict[str, np.ndarray]:
    """Everything the official code is asked, its weights changed by `rounding`."""
    vae, var = official_by_recipe(repo, config)
    found = {}
    for name, network in (("vae", vae), ("var", var)):
        found[f"{name}/names"] = names_digest({k: tuple(x.shape) for k, x in network.state_dict().items()})
        perturbed(network, rounding)
    wanted = labels(CONFIGS[config])
    tokens = vae.img_to_idxBl(images(config))
    inputs = vae.quantize.idxBl_to_var_input(tokens)
    found["tokens"] = torch.cat(tokens, dim=1).to(torch.int16).numpy()
    found["reconstruction"] = probe(vae.idxBl_to_img(tokens, same_shape=True, last_one=True))
    found["var_inputs"] = probe(inputs)
    found["logits"] = probe(var(wanted, inputs))
    found["noise"] = noise_digest()
    for name, run in runs(config).items():
        made, drawn = drawn_tokens(repo, run, var, wanted)
        found[f"{name}/tokens"] = np.array([digest(t) for t in drawn])
        found[f"{name}/images"] = np.stack([probe(image) for image in made])
    return found


def main(repo: str, *configs: str) -> None:
    """Write the files of the named configurations, or of all."""
    torch.set_num_threads(1)
    for config in configs or CONFIGS:
        found = answers(repo, config)
        for name, other in answers(repo, config, ROUNDING).items():
            if name.endswith("tokens") and not np.array_equal(found[name], other):
                raise SystemExit(f"{config}: {name} hang on the last bits of a float; change the recipe")
        path = Path(__file__).with_name(f"{config}.npz")
        np.savez_compressed(path, **found)
        print(f"{path.name}: {path.stat().st_size} bytes, {len(np.unique(found['tokens']))} different tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
