"""Quality against time when a trained model samples: guidance that stops early, and weights in bf16.

    python studies/sampling.py scenes128 --images path/of/scenes128 --output sampling \\
        --model ablation/scenes128/arms/var/0/steps/fvar/last.ckpt

Every way samples the same labels with the same noise, several times with other noise. The table has the Frechet
distance in the features of EfficientNet-Lite0 to held-out images, precision and recall, and processor time; where the
guidance stops, the unconditional half of the batch stops with it. Every row is kept as soon as it is done: the same
command goes on where it was stopped.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from judging import distances, likeness, samples, statistics_of
from sets import SETS, data_module, held_out
from tables import differences, markdown, paired, spread

from fvar_lightning.atomic import write_json
from fvar_lightning.generation.guidance import ramp
from fvar_lightning.metrics.statistics import Statistics
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint
from fvar_lightning.weights.identity import file_sha256

FIRST = "default"
"""What the other ways are compared with."""


def ways(strength: float, num_scales: int) -> dict[str, tuple[list[float], torch.dtype]]:
    """Strengths at every scale, and the weights' precision, by name."""
    full = ramp(strength, num_scales)
    found = {FIRST: (full, torch.float32), "bf16": (full, torch.bfloat16)}
    for stop in range(num_scales - 1, 1, -1):
        found[f"guidance stops after {stop} of {num_scales} scales"] = (
            full[:stop] + [0.0] * (num_scales - stop),
            torch.float32,
        )
    return found | {"no guidance": ([0.0] * num_scales, torch.float32)}


def main(args: Sequence[str] | None = None) -> str:
    """Measures what is missing, and returns the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--images", help="folder of the images, or root of the torchvision data set")
    parser.add_argument("--model", required=True, help="checkpoint of stage 2")
    parser.add_argument("--output", default="sampling", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="images to generate, and real ones to compare with")
    parser.add_argument("--noises", type=int, default=2, help="how often each way generates them")
    parser.add_argument("--guidance", type=float, help="strength at the last scale; the model's own by default")
    options = parser.parse_args(args)
    var, vae, info = load_fvar_checkpoint(options.model)
    strength = info.sampling["guidance"] if options.guidance is None else options.guidance
    sampling = {name: info.sampling[name] for name in ("top_k", "top_p")}
    inputs = {"set": options.set, "model": file_sha256(options.model), "count": options.count, "guidance": strength}
    inputs_path = options.output / "inputs.json"
    if not inputs_path.is_file():
        write_json(inputs_path, inputs)
    elif (known := json.loads(inputs_path.read_text())) != inputs:
        parser.error(f"--output {options.output} holds figures of {known}, not of {inputs}")
    real_path = options.output / "real.npz"
    if not real_path.is_file():
        statistics_of(held_out(data_module(options.set, options.images), options.count)).save(real_path)
    real = Statistics.load(real_path)

    results: dict[str, dict[int, dict[str, float]]] = {}
    for noise in range(options.noises):
        for name, (guidance, precision) in ways(strength, len(var.layout.patch_nums)).items():
            path = options.output / f"{name.replace(' ', '_')}-{noise}.json"
            if not path.is_file():
                start = time.process_time()
                made = samples(
                    var.to(precision), vae.to(precision), options.count, noise * options.count,
                    guidance=guidance, **sampling,
                )  # fmt: skip
                spent = 1000 * (time.process_time() - start) / options.count
                statistics = statistics_of(made)
                figures = distances(statistics, real, "real") | likeness(statistics, real) | {"time": spent}
                write_json(path, figures)
                if precision != torch.float32:  # rounded: read them anew
                    var, vae, _ = load_fvar_checkpoint(options.model)
            results.setdefault(name, {})[noise] = json.loads(path.read_text())
    rows = []
    for name, found in results.items():
        difference = "" if name == FIRST else paired(differences(found, results[FIRST], "fd/real"))
        columns = ("fd/real", "precision", "recall", "time")
        rows.append([name, *(spread([figures[c] for figures in found.values()]) for c in columns), difference])
    head = ["", "Frechet distance", "precision", "recall", "ms an image", "difference in Frechet distance"]
    return markdown(head, rows)


if __name__ == "__main__":
    print(main())
