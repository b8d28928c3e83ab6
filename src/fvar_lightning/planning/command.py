"""`fvar plan`: what a configuration takes, before it is run: parameters, work, memory and time."""

import json
import warnings
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from fvar_lightning.cli import configs, link_views
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.planning.cost import step_cost
from fvar_lightning.planning.layout import GROWING, largest_batch, layout_of, memory
from fvar_lightning.planning.plan import GIB, Assumptions, Plan, text
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.weights.checkpoints import load_tokenizer
from fvar_lightning.weights.describe import describe

AUTOCAST = {"32": None, "32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""Precisions of the trainer that are counted."""


class Planner:
    """Makes plans of command lines: those of `fvar fit`, and `Assumptions`."""

    def __init__(self) -> None:
        self.parser = LightningArgumentParser(
            prog="fvar plan",
            description="What a configuration takes, before it is run. Takes what `fvar fit` takes, but no checkpoint.",
            allow_abbrev=False,
        )
        self.parser.add_argument("-c", "--config", action=ActionConfigFile, help="of the run; later ones override")
        self.parser.add_argument("--seed_everything", type=bool | int, default=False, help="changes nothing here")
        self.parser.add_argument("--json", action="store_true", help="print an object of JSON, bytes and operations")
        self.parser.add_class_arguments(Assumptions, None)
        self.parser.add_lightning_class_args(Trainer, "trainer")
        self.parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        self.parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        link_views(self.parser)

    def plan(self, config: Namespace) -> Plan:
        """The plan of what `parser` made of a command line.

        Raises:
            ValueError: naming what cannot be planned.
        """
        assumed = assumptions(config)
        trainer, batch_size = config.trainer, config.data.init_args.batch_size
        dtype = autocast_of(trainer)
        notes: list[str] = []
        data = self._data(config.data)
        task = self._task(config.model, data, assumed, notes)
        layout = layout_of(trainer, assumed.gpus, half=dtype is not None)
        cost = step_cost(task, data, batch_size, dtype)
        parts = memory(task, cost, layout)

        def total(images: int) -> int:
            ours = cost if images == batch_size else step_cost(task, data, images, dtype)
            return sum(memory(task, ours, layout).values())

        available = round(assumed.memory * (1 - assumed.reserve) * GIB)
        growing = sum(parts.get(name, 0) for name in GROWING)
        micro_steps, steps = steps_of(trainer, assumed.images // (batch_size * layout.gpus))
        # float32 goes half as fast
        work = cost.flops + cost.frozen_flops * (1 if dtype is None else 2)
        return Plan(
            name=" + ".join(_name(Path(path)) for path in config.config or ()),
            parameters=_parameters(task),
            tokens=_tokens(task),
            precision=str(trainer.precision or "32-true"),
            strategy=layout.strategy,
            gpus=layout.gpus,
            batch_size=batch_size,
            accumulate=trainer.accumulate_grad_batches,
            steps=steps,
            flops=cost.flops / batch_size,
            frozen_flops=cost.frozen_flops / batch_size,
            memory=parts,
            available=available,
            largest_batch=largest_batch(total, sum(parts.values()) - growing, batch_size, available),
            seconds=work * micro_steps / (assumed.tflops * 1e12 * assumed.utilisation),
            notes=notes,
        )

    def _data(self, config: Namespace) -> ImageDataModule | None:
        """What makes images and views; None where tokens come from a cache, which need not be there."""
        if issubclass(_load(config.class_path), TokenDataModule):
            return None
        return self.parser.instantiate(Namespace(data=config)).data

    def _task(self, config: Namespace, data: ImageDataModule | None, assumed: Assumptions, notes: list[str]) -> Any:
        """The task on device meta, its tokenizers described where their files are not there."""
        arguments = config.init_args
        arguments.compile = False
        if issubclass(_load(config.class_path), FVARTask):
            arguments.num_classes, arguments.initial_weights = assumed.classes, None
            for kind, stand_in in (("structure", assumed.structure), ("alias", assumed.alias)):
                source = arguments[f"{kind}_tokenizer"]
                if isinstance(source, str):
                    arguments[f"{kind}_tokenizer"] = self._describe(source, stand_in, data, notes)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="for .* copying from a non-meta parameter")
            task = self.parser.instantiate(Namespace(model=config)).model
            task.configure_model()
        return task

    def _describe(self, source: str, stand_in: str, data: ImageDataModule | None, notes: list[str]) -> dict[str, Any]:
        """The tokenizer in a file; where there is none, that of a configuration, for the schedule of the data."""
        if Path(source).exists():
            return describe(load_tokenizer(source, schedule=None if data is None else data.schedule))
        config = self.parser.parse_args([f"--config={stand_in}"])
        notes.append(f"{source} is not there: as {_name(Path(stand_in))} makes it")
        with torch.device("meta"):
            description = describe(self._task(config.model, None, Assumptions(), []).tokenizer)
        if data is not None:
            description["schedule"] = asdict(data.schedule)
            description["psf"] = description["psf"] and data.psf
        return description


def assumptions(config: Namespace) -> Assumptions:
    """Those of a command line."""
    return Assumptions(**{field.name: config[field.name] for field in fields(Assumptions)})


def autocast_of(trainer: Namespace) -> torch.dtype | None:
    """What the trainer's precision computes in, None for float32.

    Raises:
        ValueError: for a precision that is not counted.
    """
    precision = str(trainer.precision or "32-true")
    if precision not in AUTOCAST:
        raise ValueError(f"trainer.precision must be one of {tuple(AUTOCAST)} for a plan, got {precision!r}")
    return AUTOCAST[precision]


def steps_of(trainer: Namespace, batches: int) -> tuple[int, int]:
    """Passes and steps of the optimiser in the whole run.

    Args:
        trainer: its options.
        batches: of every process in an epoch.
    """
    accumulate = trainer.accumulate_grad_batches
    an_epoch = max(-(-batches // accumulate), 1)
    bounds = [] if trainer.max_steps == -1 else [trainer.max_steps]
    epochs = trainer.max_epochs
    if epochs is None and not bounds:
        epochs = 1000  # Lightning's own
    if epochs not in (None, -1):
        bounds.append(epochs * an_epoch)
    if not bounds:
        raise ValueError("trainer needs max_steps or max_epochs for a plan, got neither")
    return min(bounds) * accumulate, min(bounds)


def _load(class_path: str) -> type:
    module, name = class_path.rsplit(".", 1)
    return getattr(import_module(module), name)


def _name(path: Path) -> str:
    """Short for configurations that come with the package."""
    folder = configs().resolve()
    path = path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _parameters(task: nn.Module) -> dict[str, int]:
    """Of every network."""
    found = {}
    for name, network in task.named_children():
        count = sum(p.numel() for p in network.parameters())
        frozen = not any(p.requires_grad for p in network.parameters())
        if count:
            name = {"vae": "structure tokenizer"}.get(name, name.replace("_", " "))
            found[f"{name}, frozen" if frozen else name] = count
    return found


def _tokens(task: Any) -> int:
    """Of an image."""
    if isinstance(task, FVARTask):
        return task.student.layout.length
    return sum(side**2 for side in task.schedule.patch_nums[: task.scales])


def plan_command(args: list[str]) -> None:
    """`fvar plan` with the given arguments."""
    planner = Planner()
    config = planner.parser.parse_args(args)
    try:
        plan = planner.plan(config)
    except ValueError as error:
        planner.parser.error(str(error))
    if config.json:
        print(json.dumps(asdict(plan), indent=2))
    else:
        print(text(plan, assumptions(config)))
