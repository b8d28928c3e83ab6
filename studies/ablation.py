"""Does next focus beat next scale? The paper's Table 3 in miniature, with seeds, controls and equal budgets.

    python studies/ablation.py scenes128    --images path/of/scenes128     --output ablation
    python studies/ablation.py FashionMNIST --images path/of/fashion_mnist --output ablation
    python studies/ablation.py photographs  --output ablation

For every seed: the tokenizers and token caches that arms share, then the students of all arms (studies/arms.py) from
these caches, with the same images, steps, batches and start, and what each of them generates. Figures are Frechet and
kernel distance in the features of EfficientNet-Lite0 to held-out images, and to their reconstructions by the arm's
tokenizer, which is what the generator alone adds; precision and recall; spectrum and grid; cross-entropy of held-out
tokens; the teacher's gap. With --equal-time arms whose steps take longer than the baseline's run once more, for so many
steps as take the baseline's time. With --guidance the same students are sampled at other strengths too.

Everything is kept as soon as it is done: the same command goes on where it was stopped, with more arms and seeds too,
and two with different --seeds may run at once. What is written is of the seeds and arms asked for: report.md, beside it
figures.csv, plots, a picture sheet for each of the first seeds, and inputs.json, which says what all was made with.
"""

import argparse
import csv
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, CONTROLS, OPTICS, PAPER, TOKENS, Arm, override
from judging import (
    codes_in_use,
    cross_entropies,
    detail,
    distances,
    likeness,
    reconstructions,
    samples,
    seconds_per_step,
    settling,
    statistics_of,
)
from report import plot_arms, plot_gaps, plot_learning, text, write_figures, write_sheet
from sets import (
    NETWORKS,
    QUICKSTART,
    SETS,
    STAGE_2_STEPS,
    STUDENT,
    TOKENIZER_STEPS,
    contents,
    data_module,
    held_out,
    images_of,
)

from fvar_lightning.atomic import replacing, write_json
from fvar_lightning.callbacks.loggers import read_metrics
from fvar_lightning.cli import main as run
from fvar_lightning.metrics.statistics import Statistics
from fvar_lightning.quickstart import train
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint, load_tokenizer
from fvar_lightning.weights.identity import versions

ALIAS_EFFORT = 1.0
"""Of the alias tokenizer at most: what --tokenizer-effort is to better are the images."""
MUCH_SLOWER = 1.02
"""Arms whose steps take longer than so many of the baseline's run again for equal time."""
BATCH_SIZE = 16
SHOWN = 64
"""Samples kept of every run, for the sheets."""


def guided_by(strength: object) -> str:
    """Name of a budget: equal steps, and this strength of guidance."""
    return f"guidance {strength}"


@dataclass(frozen=True)
class Study:
    """One data set's runs, below a folder."""

    name: str
    images: str | None
    folder: Path
    effort: float
    tokenizer_effort: float
    crops: int
    count: int

    # What arms share

    def alias(self, optics: str, seed: int) -> Path:
        """Checkpoint of the alias tokenizer."""
        folder = self.folder / "alias" / optics / str(seed)
        if not (done := folder / "done").is_file():
            arguments = [f"--seed_everything={seed}", *images_of(self.name, self.images, seed), *OPTICS[optics]]
            effort = min(self.tokenizer_effort, ALIAS_EFFORT)
            train("alias", folder, effort, [*arguments, "--trainer.limit_val_batches=0"])
            done.touch()
        return folder / "alias" / "last.ckpt"

    def structure(self, tokens: str, seed: int) -> Path:
        """Checkpoint of the structure tokenizer."""
        optics, own = TOKENS[tokens]
        folder = self.folder / "structure" / tokens / str(seed)
        if not (done := folder / "done").is_file():
            arguments = [f"--seed_everything={seed}", *images_of(self.name, self.images, seed), *OPTICS[optics]]
            arguments += [*own, f"--model.seed={seed}", *NETWORKS[self.name]]
            train("structure", folder, self.tokenizer_effort, [*arguments, "--trainer.limit_val_batches=0"])
            done.touch()
        return folder / "structure" / "last.ckpt"

    def reconstructed(self, tokens: str, seed: int) -> Path:
        """Statistics of the reconstructions of the held-out images; their figures lie beside them."""
        path = self.folder / "structure" / tokens / str(seed) / "reconstructions.npz"
        if not path.is_file():
            vae = load_tokenizer(self.structure(tokens, seed))
            assert isinstance(vae, VQVAE)
            made = reconstructions(vae, self.real_images)
            statistics = statistics_of(made)
            figures = distances(statistics, self.real, "real") | likeness(statistics, self.real)
            figures |= detail(made, self.real_images, vae.schedule.patch_size)
            write_json(path.with_suffix(".json"), figures)
            statistics.save(path)
        return path

    def tokenizers(self, arm: Arm, seed: int) -> list[str]:
        """Arguments that choose both; the one that no teacher reads too, so that all students start alike."""
        alias = f"={self.alias(TOKENS[arm.tokens][0], seed)}" if arm.alias == "own" else "=null"
        return [f"--model.structure_tokenizer={self.structure(arm.tokens, seed)}", f"--model.alias_tokenizer{alias}"]

    def cache(self, arm: Arm, seed: int) -> Path:
        """Folder of the token caches of both parts."""
        folder = self.folder / "tokens" / f"{arm.tokens}-{arm.alias}" / str(seed)
        for part in ("train", "val"):
            if not (done := folder / f"{part}.done").is_file():
                alone = [override("no_teacher")] if arm.alias == "none" else []
                run(["predict", f"--config={QUICKSTART / 'tokens.yaml'}", *alone,
                     *images_of(self.name, self.images, seed), *OPTICS[TOKENS[arm.tokens][0]],
                     *self.tokenizers(arm, seed), "--data.predict=tokens", f"--data.part={part}",
                     f"--data.crops_per_image={self.crops}", f"--trainer.callbacks.folder={folder / part}",
                     f"--trainer.default_root_dir={folder}"])  # fmt: skip
                done.touch()
        return folder

    @cached_property
    def real_images(self) -> torch.Tensor:
        """(N, 3, H, W) uint8, the same for all seeds."""
        return held_out(data_module(self.name, self.images), self.count)

    @cached_property
    def real(self) -> Statistics:
        """Of the real images."""
        path = self.folder / "real.npz"
        if not path.is_file():
            statistics_of(self.real_images).save(path)
        return Statistics.load(path)

    # Arms

    def place(self, name: str, seed: int, budget: str) -> Path:
        """Folder of a run."""
        return self.folder / "arms" / name / str(seed) / budget

    def student(self, name: str, seed: int, budget: str, effort: float) -> dict[str, float]:
        """Figures of a run, made if they are missing."""
        arm, folder = ARMS[name], self.place(name, seed, budget)
        if (path := folder / "figures.json").is_file():
            return json.loads(path.read_text())
        cache = self.cache(arm, seed)
        steps = max(round(effort * STAGE_2_STEPS), 2)
        arguments = [f"--model={arm.task}"] if arm.task != "FVARTask" else []
        tokens = [f"--data.path={cache / 'train'}", f"--data.val_path={cache / 'val'}"]
        images = [*images_of(self.name, self.images, seed), *OPTICS[TOKENS[arm.tokens][0]]]
        arguments += [*(tokens if arm.cached else images), f"--data.seed={seed}", f"--data.batch_size={BATCH_SIZE}"]
        arguments += [*STUDENT, *arm.arguments, *self.tokenizers(arm, seed), f"--seed_everything={seed}"]
        arguments += [f"--model.seed={seed}"]
        seldom = [f"--trainer.val_check_interval={max(steps // 8, 1)}", "--trainer.limit_val_batches=16"]
        task = train("fvar", folder, effort, [*arguments, *seldom]).model
        figures = self.judge(folder, folder, arm.tokens, seed)
        var, vae, _ = load_fvar_checkpoint(folder / "fvar" / "last.ckpt")
        figures |= cross_entropies(var, vae, cache / "val", self.count)
        figures |= codes_in_use(vae.vocab_size, var.layout.patch_nums, cache / "val", self.count)
        if task.teacher is not None:
            figures |= self.gap(folder, arguments)
        curve = read_metrics(folder / "fvar").get("val/student", [])
        figures |= {"steps": steps, "settled": settling(curve)}
        if arm.cached:
            figures["seconds_per_step"] = seconds_per_step(task, cache / "train", BATCH_SIZE)
        figures["wall_clock"] = json.loads((folder / "seconds.json").read_text())["fvar"]
        write_json(path, figures)
        return figures

    def judge(self, trained: Path, folder: Path, tokens: str, seed: int, **sampling: Any) -> dict[str, float]:
        """Figures of what a trained student generates, some of which goes into the folder; sampled in the student's own
        way but for what is given."""
        var, vae, info = load_fvar_checkpoint(trained / "fvar" / "last.ckpt")
        made = samples(var, vae, self.count, seed * self.count, **info.sampling | sampling)
        with replacing(folder / "samples.npz") as beside, beside.open("wb") as file:
            np.savez(file, images=made[:: max(len(made) // SHOWN, 1)].numpy())
        statistics = statistics_of(made)
        figures = distances(statistics, self.real, "real") | likeness(statistics, self.real)
        reconstructed = Statistics.load(self.reconstructed(tokens, seed))
        figures |= distances(statistics, reconstructed, "reconstructions")
        return figures | detail(made, self.real_images, vae.schedule.patch_size)

    def guided(self, name: str, seed: int, strength: float) -> None:
        """Figures of the same student at another strength of guidance, made if they are missing."""
        folder = self.place(name, seed, guided_by(strength))
        if not (path := folder / "figures.json").is_file():
            folder.mkdir(exist_ok=True)
            trained = self.place(name, seed, "steps")
            write_json(path, self.judge(trained, folder, ARMS[name].tokens, seed, guidance=strength))

    def gap(self, folder: Path, arguments: list[str]) -> dict[str, float]:
        """What `TeacherGap` finds."""
        run(["validate", f"--config={QUICKSTART / 'fvar.yaml'}", *arguments, "--trainer.callbacks=TeacherGap",
             "--trainer.logger=false", f"--trainer.default_root_dir={folder}", "--trainer.limit_val_batches=32",
             f"--ckpt_path={folder / 'fvar' / 'last.ckpt'}"])  # fmt: skip
        with (folder / "teacher_gap.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("teacher_gap", "teacher_gap_shuffled", "teacher_gate")
        return {f"{name}/{row['scale']}": float(row[name]) for name in names for row in rows}

    def equal_time(self, name: str, seed: int, baseline: dict[str, float]) -> dict[str, float]:
        """Figures of an arm that had the baseline's time: a run of its own only where its steps take longer."""
        figures = self.student(name, seed, "steps", self.effort)
        path = self.place(name, seed, "time") / "effort.json"
        if not path.is_file():  # timings differ from run to run: decided once
            slower = figures["seconds_per_step"] / baseline["seconds_per_step"]
            write_json(path, {"effort": self.effort / slower if slower > MUCH_SLOWER else self.effort})
        effort = json.loads(path.read_text())["effort"]
        return figures if effort == self.effort else self.student(name, seed, "time", effort)

    def found(self, name: str, seeds: Sequence[int], budget: str) -> dict[int, dict[str, float]]:
        """What of an arm is done, by seed; for equal time that of equal steps where it needed no other run."""
        figures = {}
        for seed in seeds:
            path = self.place(name, seed, budget) / "figures.json"
            plan = path.with_name("effort.json")
            if plan.is_file() and json.loads(plan.read_text())["effort"] == self.effort:
                path = self.place(name, seed, "steps") / "figures.json"
            if path.is_file():
                figures[seed] = json.loads(path.read_text())
        return figures

    # What is written

    def inputs(self) -> dict[str, Any]:
        """What decides the figures, but for seeds and arms."""
        data = data_module(self.name, self.images)
        return {
            "set": self.name,
            "images": {part: contents(data.real_images(part)) for part in ("train", "val")},
            "effort": self.effort,
            "tokenizer_effort": self.tokenizer_effort,
            "crops": self.crops,
            "generated_and_real": self.count,
            "batch_size": BATCH_SIZE,
        }

    def write(self, seeds: Sequence[int], names: Sequence[str], baseline: str, sheets: int) -> str:
        """Tables, plots and sheets of what is done so far of these seeds and arms; the tables."""
        runs = [self.place(name, seed, "") for name in names for seed in seeds]
        strengths = {path.name for run in runs for path in run.glob(guided_by("*"))}
        budgets = {
            budget: {name: found for name in names if (found := self.found(name, seeds, budget))}
            for budget in ("steps", "time", *sorted(strengths))
        }
        budgets = {budget: results for budget, results in budgets.items() if results}
        files = {
            (tokens, seed): self.folder / "structure" / tokens / str(seed) / "reconstructions.json"
            for tokens in dict.fromkeys(ARMS[name].tokens for name in names)
            for seed in seeds
        }
        tokenizers: dict[str, dict[int, dict[str, float]]] = {}
        for (tokens, seed), file in files.items():
            if file.is_file():
                tokenizers.setdefault(tokens, {})[seed] = json.loads(file.read_text())
        written = text(budgets, tokenizers, baseline)
        with replacing(self.folder / "report.md") as beside:
            beside.write_text(f"# {self.name}\n\n{written}")
        write_figures(self.folder / "figures.csv", {"tokenizers": tokenizers} | budgets)
        for budget, results in budgets.items():
            plot_arms(self.folder / f"{budget}.png", results, baseline)
        plot_gaps(self.folder / "teacher_gap.png", budgets["steps"])
        for seed in seeds[:sheets]:
            done = [name for name, found in budgets["steps"].items() if seed in found]
            if not done:
                continue
            places = {name: self.place(name, seed, "steps") for name in done}
            write_sheet(self.folder / f"samples-{seed}.png", {n: p / "samples.npz" for n, p in places.items()})
            curves = {name: read_metrics(p / "fvar").get("val/student", []) for name, p in places.items()}
            plot_learning(self.folder / f"learning-{seed}.png", {n: curve for n, curve in curves.items() if curve})
        return written


def record(
    study: Study, arms: Sequence[str], seeds: Sequence[int], budgets: Sequence[str], parser: argparse.ArgumentParser
) -> None:
    """Write down what the figures of these arms, seeds and budgets are made with, unless they are there already; refuse
    a folder of others."""
    path, inputs = study.folder / "inputs.json", study.inputs()
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                            capture_output=True, text=True, check=False).stdout.strip()  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    run_by = {
        "arms": arms,
        "seeds": seeds,
        "budgets": budgets,
        "commit": commit or "unknown",
        "versions": versions(),
        "hardware": {"cpu": cpus[0] if cpus else platform.processor(), "gpu": gpu, "threads": torch.get_num_threads()},
    }
    runs = []
    if path.is_file():
        known = json.loads(path.read_text())
        if known["inputs"] != inputs:
            parser.error(f"--output {study.folder} holds figures of {known['inputs']}, not of {inputs}")
        runs = known["run_by"]
    missing = any(set(seeds) - study.found(name, seeds, budget).keys() for name in arms for budget in budgets)
    if not runs or (missing and run_by not in runs):
        write_json(path, {"inputs": inputs, "run_by": [*runs, run_by]})


def main(args: Sequence[str] | None = None) -> str:
    """Runs what is missing, and returns the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--images", help="folder of the images, or root of the torchvision data set")
    parser.add_argument("--output", default="ablation", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, metavar="ARM", default=[*PAPER, *CONTROLS], help="of studies/arms.py"
    )
    parser.add_argument("--baseline", choices=ARMS, metavar="ARM", default="var")
    parser.add_argument("--effort", type=float, default=1.25, help=f"factor on {STAGE_2_STEPS} steps of stage 2")
    parser.add_argument(
        "--tokenizer-effort",
        type=float,
        default=1.0,
        help=f"factor on the structure tokenizer's {TOKENIZER_STEPS} steps",
    )
    parser.add_argument("--crops", type=int, default=4, help="passes over the training images in the token cache")
    parser.add_argument("--count", type=int, default=2000, help="images to generate, and real ones to compare with")
    parser.add_argument("--equal-time", action="store_true", help="slower arms once more, for the baseline's time")
    parser.add_argument("--guidance", type=float, nargs="+", default=[], help="strengths to sample with beside the own")
    parser.add_argument("--sheets", type=int, default=2, help="seeds that get a picture sheet")
    parser.add_argument("--report", action="store_true", help="run nothing: tables of what is done")
    parser.add_argument("--tiny", action="store_true", help="a size of seconds: that it runs, not what comes out")
    options = parser.parse_args(args)
    if options.set != "photographs" and options.images is None:
        parser.error(f"--images must tell where those of {options.set} lie")
    if options.tiny:
        options.effort, options.tokenizer_effort, options.crops, options.count = 0.01, 0.005, 1, 24
    uncached = [name for name in (options.baseline, *options.arms) if not ARMS[name].cached]
    if options.equal_time and uncached:
        parser.error(f"--equal-time times steps from cached tokens; those of {', '.join(uncached)} read images")
    study = Study(options.set, options.images, options.output / options.set, options.effort, options.tokenizer_effort,
                  options.crops, options.count)  # fmt: skip
    names = list(dict.fromkeys([options.baseline, *options.arms]))
    if options.report:
        if not any(study.found(name, options.seeds, "steps") for name in names):
            parser.error(f"--output {study.folder} holds no figures of {', '.join(names)} yet")
        return study.write(options.seeds, names, options.baseline, options.sheets)
    budgets = ["steps", *["time"] * options.equal_time, *map(guided_by, options.guidance)]
    record(study, names, options.seeds, budgets, parser)
    for seed in options.seeds:
        baseline = study.student(options.baseline, seed, "steps", study.effort)
        for name in names:
            study.student(name, seed, "steps", study.effort)
            study.write(options.seeds, names, options.baseline, options.sheets)
        for name in names if options.equal_time else ():
            study.equal_time(name, seed, baseline)
        for name in names:
            for strength in options.guidance:
                study.guided(name, seed, strength)
    return study.write(options.seeds, names, options.baseline, options.sheets)


if __name__ == "__main__":
    print(main())
