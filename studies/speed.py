"""The table of docs/speed.md: time and memory of generation, tokenising and both stages, beside official VAR.

    VAR_REPO=path/of/a/checkout python studies/speed.py [parts] [--rounds 3] [--threads 1]

Parts: generation, tokens, stage1, stage2, memory, growth, profile; all by default. Without a checkout of the official
code (github.com/FoundationVision/VAR) what is compared with it is left out. Times are the processor's, peers take
turns, and ratios are medians over the rounds, with their extremes. FVAR_BENCHMARK=tiny runs all of it in a minute, at
sizes that mean nothing.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import torch
from growth import growth
from rows import TINY, print_head, print_row, seconds
from speed_models import (
    OFFICIAL,
    Models,
    bfloat16,
    models,
    official_step,
    stage1_layouts,
    stage1_parts,
    stage2_step,
)
from torch import Tensor

from fvar_lightning.activations import saved_bytes
from fvar_lightning.generation.sampling import generate, sample

BATCHES = (1,) if TINY else (1, 4, 8)
"""Of generation."""

Runs = Mapping[str, Callable[[], object]]


def compare(
    case: str, runs: Runs, peers: Mapping[str, list[str]], rounds: int, images: int = 1, *, warm: bool = False
) -> None:
    """Print a row of seconds an image for every run, and of how many times its peers take for those that have some.

    Args:
        case: name of the row.
        runs: by name; those that are not there (no official code) are left out.
        peers: of each run, by name.
        rounds: in each of which every run has its turn.
        images: that a run makes.
        warm: whether the same code ran before.
    """
    for run in () if warm else runs.values():
        run()
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    for name in runs:
        ratios = []
        for peer in peers.get(name, []):
            if peer in runs:
                all_rounds = [t[peer] / t[name] for t in times]
                low, high = min(all_rounds), max(all_rounds)
                ratios.append(f"{statistics.median(all_rounds):.2f} ({low:.2f}-{high:.2f}) of {peer}")
        print_row(case, name, f"{statistics.median(t[name] for t in times) / images:.3f}", "; ".join(ratios) or "-")


COLUMNS = ("case", "code", "seconds an image", "speed-up: peer's time over its own")


def generation(rounds: int) -> None:
    """Images of random weights, depth 8, 256 px."""
    print_head("Generation, top_k 900, top_p 0.96", *COLUMNS)
    ours = models(TINY)
    half = bfloat16(ours)
    for batch in BATCHES:
        labels = torch.arange(batch)
        for guidance in (0.0, 1.5, 4.0):
            runs: dict[str, Callable[[], object]] = {}
            if OFFICIAL:
                runs["official float32"] = lambda b=batch, y=labels, g=guidance: ours.official_generate(b, y, g)
                runs["official bf16 autocast"] = lambda b=batch, y=labels, g=guidance: autocast(
                    lambda: ours.official_generate(b, y, g)
                )
            for name, it in (("float32", ours), ("bf16", half)):
                runs[name] = lambda it=it, y=labels, g=guidance: generate(
                    it.var, it.vae, y, guidance=g, generator=torch.Generator().manual_seed(0)
                )
            peers = {"float32": ["official float32"], "bf16": ["official float32", "official bf16 autocast", "float32"]}
            compare(f"batch {batch}, guidance {guidance}", runs, peers, rounds, batch, warm=batch > BATCHES[0])
    print(
        f"\nTokens that bf16 changes, drawn after the same tokens with the same noise: {changed_tokens(ours, half):.1%}"
    )


def changed_tokens(ours: Models, half: Models) -> float:
    """Share of the tokens of an image that the weights in bf16 would have drawn otherwise."""
    drawn: list[Tensor] = []

    def watch(scale: int, f_hat: Tensor, tokens: Tensor) -> Tensor:
        drawn.append(tokens)
        return torch.full_like(tokens, -1)

    def follow(scale: int, f_hat: Tensor, tokens: Tensor) -> Tensor:
        changed.append((tokens != drawn[scale]).flatten())
        return drawn[scale]

    changed: list[Tensor] = []
    for it, revise in ((ours, watch), (half, follow)):
        for _ in sample(it.var, it.vae, torch.zeros(1, dtype=torch.long), seeds=[0], revise=revise):
            pass
    return torch.cat(changed).float().mean().item()


def autocast(run: Callable[[], object]) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


def tokens(rounds: int) -> None:
    """Images to token maps."""
    print_head("Tokenising", *COLUMNS)
    ours = models(TINY)
    half = bfloat16(ours)
    batch = 1 if TINY else 4
    images = torch.rand(batch, 3, ours.size, ours.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    views = ours.views.inputs(images)
    runs: dict[str, Callable[[], object]] = {}
    if OFFICIAL:
        runs["official float32"] = lambda: ours.official_vae.img_to_idxBl(images)
    runs["`feature`, float32"] = lambda: ours.vae.encode(images)
    runs["`feature`, bf16"] = lambda: half.vae.encode(images.bfloat16())
    runs["`view`, float32"] = lambda: ours.views.encode(views)
    runs["`view`, bf16"] = lambda: half.views.encode([view.bfloat16() for view in views])
    runs["optics of `view`"] = lambda: ours.views.inputs(images)
    peers = {name: ["official float32"] for name in runs if name.startswith("`")}
    with torch.no_grad():
        compare(f"batch {batch}", runs, peers, rounds, batch)


def stage1(rounds: int) -> None:
    """A step of the structure tokenizer's training by part, each forward and backward."""
    print_head("Stage 1, forward and backward by part", *COLUMNS)
    parts, networks = stage1_parts(TINY)
    compare("batch 1", {name: lambda loss=loss: loss().backward() for name, loss in parts.items()}, {}, rounds)
    print_head("Stage 1, what a part keeps for its backward pass", "part", "MiB")
    for name, loss in parts.items():
        print_row(name, f"{saved_bytes(loss, *networks) / 2**20:.0f}")
    print_head("Stage 1, the autoencoder forward and backward by layout of its maps", *COLUMNS)
    for case, runs in stage1_layouts(TINY).items():
        compare(case, runs, {f"{p}, channels last": [f"{p}, contiguous"] for p in ("float32", "bf16")}, rounds)


STEPS = ("official", "plain", "shared", "separate")
BATCH = 1 if TINY else 4


def step_of(name: str) -> Callable[[], object]:
    """A whole step of stage 2, by name: which network, and bf16 for autocast."""
    network, *autocast = name.split()
    if network == "official":
        return official_step(TINY, BATCH, bool(autocast))
    return stage2_step(TINY, BATCH, network, bool(autocast))


def step_names() -> list[str]:
    networks = STEPS if OFFICIAL else STEPS[1:]
    return [f"{network}{precision}" for precision in ("", " bf16") for network in networks]


def stage2(rounds: int) -> None:
    """Steps from cached tokens; the official trainer's from images."""
    print_head("Stage 2, a step with AdamW; ours from cached tokens, bf16 under autocast", *COLUMNS)
    peers = {
        name: [peer + name[len(name.split()[0]) :] for peer in ("official", "plain") if peer != name.split()[0]]
        for name in step_names()
        if not name.startswith("official")
    }
    compare(f"batch {BATCH}", {name: step_of(name) for name in step_names()}, peers, rounds, BATCH)


def memory(rounds: int) -> None:
    """The same steps, each in a process of its own."""
    print_head(
        "Stage 2, memory of a process: its peak over two steps, and that of one that only imports", "step", "GiB"
    )
    for name in ("nothing", *(step_names()[:1] if TINY else step_names())):
        command = [sys.executable, __file__, "--peak", name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print_row(name, f"{float(out.split()[-1]):.2f}")


def print_peak(name: str) -> None:
    """GiB of this process at its peak, as Linux tells it; the figure of `getrusage` begins with the parent's."""
    if name != "nothing":
        run = step_of(name)
        run(), run()
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20)


def profile(rounds: int) -> None:
    """Where the time goes."""
    print_head("Where the time goes: the operations that take most of the processor", "run", *map(str, range(1, 7)))
    ours = models(TINY)
    half = bfloat16(ours)
    labels = torch.zeros(1, dtype=torch.long)
    runs: dict[str, Callable[[], object]] = {
        "generation": lambda: generate(ours.var, ours.vae, labels, seeds=[0]),
        "generation, bf16": lambda: generate(half.var, half.vae, labels, seeds=[0]),
    }
    runs |= {f"stage-2 step, {name}": step_of(name) for name in ("plain", "shared", "plain bf16")}
    for name, run in runs.items():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        whole = sum(event.self_cpu_time_total for event in events)
        shares = [f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / whole:.0%}" for e in events[:6]]
        print_row(name, *shares)


PARTS = {part.__name__: part for part in (generation, tokens, stage1, stage2, memory, growth, profile)}


def machine(threads: int) -> str:
    """Which processor, with which matrix units, and which versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in _cpuinfo() if line.startswith("flags")), [])
    units = {"AVX-512": "avx512f", "AVX512_BF16": "avx512_bf16", "AMX": "amx_tile"}
    have = ", ".join(f"{'with' if flag in flags else 'without'} {unit}" for unit, flag in units.items())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{names[0] if names else platform.processor()} ({have}), {os.cpu_count()} cores, {threads} thread(s); load "
        f"{load:.1f} at the start; torch {torch.__version__}, Python {platform.python_version()}; {date.today()}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--rounds", type=int, default=1 if TINY else 3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.peak is not None:
        print_peak(chosen.peak)
        return
    print(machine(chosen.threads))
    for part in chosen.parts or PARTS:
        PARTS[part](chosen.rounds)


if __name__ == "__main__":
    main()
