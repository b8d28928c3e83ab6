"""`fvar quickstart`: all stages one after the other, small, and a report with pictures."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from time import perf_counter

import torch
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat

from fvar_lightning.atomic import write_json
from fvar_lightning.callbacks.remaining import RemainingTime
from fvar_lightning.cli import FVARCommandLine, configs, main
from fvar_lightning.data.folders import scan_folder
from fvar_lightning.report import write_report
from fvar_lightning.weights.files import read_checkpoint

CROPS_PER_IMAGE = 2
SECONDS = {"structure": 215.0, "alias": 35.0, "tokens": 10.0, "fvar": 230.0, "report": 5.0}
"""What the stages take on two CPU cores; those that train grow with the effort."""


class RefusedSource(ValueError):
    """Images that cannot be trained on, or not in this output folder."""


def quickstart(source: str = "photographs", output: str = "quickstart", effort: PositiveFloat = 1.0) -> None:
    """Train both tokenizers and the teacher-student stage, then write pictures and a report.

    Called again with the same output folder it continues where it was stopped.

    Args:
        source: 'photographs' (bundled with scikit-image), or a folder of images or of class folders.
        output: folder for checkpoints, logs, pictures and the report.
        effort: factor on the number of training steps.

    Raises:
        ValueError: if effort is not positive, if the source is a folder without images, or of which none can be held
            out, or if the output folder holds a run on another source.
    """
    if not effort > 0:
        raise ValueError(f"effort must be positive, got {effort}")
    folder = Path(output)
    keep_to_source(folder, source)
    check_images(source)
    images = [f"--data.source={source}"]
    tokenizers = [f"--model.{kind}_tokenizer={folder / kind / 'last.ckpt'}" for kind in ("structure", "alias")]

    trained = ("structure", "alias", "fvar")
    clock = RemainingTime({stage: s * (effort if stage in trained else 1) for stage, s in SECONDS.items()})

    print(f"\n[1/4] training the structure tokenizer, {clock.begin('structure')} for all stages", flush=True)
    data = train("structure", folder, effort, images, clock).datamodule
    print(f"\n[2/4] training the alias tokenizer, {clock.begin('alias')}", flush=True)
    train("alias", folder, effort, images, clock)
    print(f"\n[3/4] writing the tokens of the images, {clock.begin('tokens')}", flush=True)
    for part in ("train", "val"):
        write_tokens(folder, part, [*images, *tokenizers])
    print(f"\n[4/4] training teacher and student, {clock.begin('fvar')}", flush=True)
    restart_if_other(folder / "fvar", folder / "tokens" / "train" / "index.json")
    caches = [f"--data.path={folder / 'tokens' / 'train'}", f"--data.val_path={folder / 'tokens' / 'val'}"]
    task = train("fvar", folder, effort, [*caches, *tokenizers], clock).model

    print(f"\nwriting the report, {clock.begin('report')}", flush=True)
    longer = ["fvar", "quickstart", "--source", source, "--output", output, "--effort", f"{4 * effort:g}"]
    write_report(folder, task, data, longer)
    print(f"done, see {folder / 'report.md'} and")
    for picture in sorted(folder.glob("*.png")):
        print(f"  {picture}")


def quickstart_command(args: list[str]) -> None:
    """`fvar quickstart` with the given arguments.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    try:
        auto_cli(quickstart, args=args, prog="fvar quickstart")
    except RefusedSource as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def accelerator() -> str:
    """A GPU of CUDA's kind where there is one, otherwise the CPU: Apple's lack the float64 of the metrics."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train(
    stage: str, folder: Path, effort: float, arguments: list[str], clock: RemainingTime | None = None
) -> FVARCommandLine:
    """One `fvar fit` of a stage, resumed from its last checkpoint where there is one."""
    config = configs() / "quickstart" / f"{stage}.yaml"
    content = yaml.safe_load(config.read_text())
    steps = max(round(effort * content["trainer"]["max_steps"]), 2)
    own = folder / stage
    args = [
        "fit",
        f"--config={config}",
        f"--trainer.max_steps={steps}",
        f"--trainer.accelerator={accelerator()}",
        f"--trainer.default_root_dir={own}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={own}",
        "--trainer.logger.name=logs",
        f"--trainer.callbacks.dirpath={own}",
    ]
    # so that the shortest run has figures, and the last ones are of its end
    validations = max(round(steps / content["trainer"]["val_check_interval"]), 1)
    args.append(f"--trainer.val_check_interval={steps // validations}")
    args.append(f"--trainer.log_every_n_steps={min(content['trainer']['log_every_n_steps'], max(steps // 10, 1))}")
    last = own / "last.ckpt"
    done = 0
    if last.is_file():
        done = read_checkpoint(last)["global_step"]
        args.append(f"--ckpt_path={last}")
    elif stage != "fvar":
        warmup = content["model"]["init_args"]["warmup_steps"]
        args.append(f"--model.warmup_steps={min(warmup, steps // 2)}")
    args += arguments
    start = perf_counter()
    cli = main(args, callbacks=[] if clock is None else [clock])
    if cli.trainer.global_step > done:
        _add_seconds(folder / "seconds.json", stage, perf_counter() - start)
    return cli


def write_tokens(folder: Path, part: str, arguments: list[str]) -> None:
    """The token cache of a part by `fvar predict`; what is there of the same tokenizers and images is kept."""
    start = perf_counter()
    args = [
        "predict",
        f"--config={configs() / 'quickstart' / 'tokens.yaml'}",
        *arguments,
        "--data.predict=tokens",
        f"--data.part={part}",
        f"--data.crops_per_image={CROPS_PER_IMAGE}",
        f"--trainer.accelerator={accelerator()}",
        f"--trainer.callbacks.folder={folder / 'tokens' / part}",
        f"--trainer.default_root_dir={folder}",
    ]
    main(args)
    _add_seconds(folder / "seconds.json", "tokens", perf_counter() - start)


def check_images(source: str) -> None:
    """Refuse a folder without images, or of which none can be held out: the last stages need both parts."""
    if not Path(source).expanduser().is_dir():
        return
    try:
        held_out = scan_folder(source)[2]
    except ValueError as error:
        raise RefusedSource(str(error)) from error
    if not len(held_out.files):
        raise RefusedSource(f"source {source!r} must hold two images of some class, to hold out one: it has one each")


def keep_to_source(folder: Path, source: str) -> None:
    """Refuse a folder of another source's run: its tokenizers would count as done."""
    note = folder / "source.json"
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser().resolve())
    trained = any(folder.glob("*/last.ckpt"))
    if trained and note.is_file() and (known := json.loads(note.read_text())["source"]) != source:
        raise RefusedSource(
            f"output {str(folder)!r} holds a run on {known!r}, not on {source!r}: give another; or remove "
            f"{str(note)!r} if these are the same images"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, {"source": source})


def restart_if_other(stage: Path, index: Path) -> None:
    """Move a stage aside that was trained on other tokens than these; remember which it is trained on."""
    trained_on = stage / "tokens.json"
    if trained_on.is_file() and trained_on.read_text() != index.read_text():
        aside = next(path for i in itertools.count(1) if not (path := stage.with_name(f"{stage.name}-{i}")).exists())
        print(f"the tokens are new: teacher and student begin anew, the former ones are in {aside}", flush=True)
        stage.rename(aside)
    stage.mkdir(parents=True, exist_ok=True)
    shutil.copy(index, trained_on)


def _add_seconds(path: Path, stage: str, seconds: float) -> None:
    spent = json.loads(path.read_text()) if path.is_file() else {}
    spent[stage] = spent.get(stage, 0) + seconds
    write_json(path, spent)
