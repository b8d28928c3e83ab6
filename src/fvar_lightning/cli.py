"""The command line of LightningCLI: `fvar fit | validate | test | predict`."""

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc import locate

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fvar_lightning.callbacks import (
    AliasMetrics,
    GenerationMetrics,
    ReconstructionMetrics,
    SamplePictures,
    TeacherGap,
    TokenizerPictures,
)
from fvar_lightning.callbacks.averaging import DeviceWeightAveraging
from fvar_lightning.callbacks.checkpoint import LastCheckpoint
from fvar_lightning.callbacks.tokens import TokenWriter
from fvar_lightning.callbacks.writers import SampleWriter
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.metrics.extractors import EfficientNetLite0, Inception
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.memory import keep_memory
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.weights.files import SHARDED_PLAIN, read_checkpoint

COMPONENTS = (
    ImageDataModule,
    TokenDataModule,
    TokenizerTask,
    AliasTokenizerTask,
    FVARTask,
    SampleWriter,
    TokenWriter,
    LastCheckpoint,
    DeviceWeightAveraging,
    GenerationMetrics,
    ReconstructionMetrics,
    AliasMetrics,
    SamplePictures,
    TeacherGap,
    TokenizerPictures,
    EfficientNetLite0,
    Inception,
)
"""Classes a configuration may name without their module: importing them here is what makes the short names known."""

KEYWORD = re.compile(r"(best|last|hpc|registry(:.*)?)$|\w+://")
"""What Lightning takes for a checkpoint beside paths: its words, and addresses."""


class FVARCommandLine(LightningCLI):
    """LightningCLI in which a task of stage 1 gets the data module's schedule and point-spread function. (That of stage
    2 asks the data module itself.)

    With ``--ckpt_path``, ``--model`` options of the command line count more than the checkpoint's hyper-parameters, and
    these more than configuration files. (In LightningCLI the checkpoint silently wins over both.)
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        link_views(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Set the checkpoint aside, whose hyper-parameters LightningCLI would put on top of all else."""
        super().parse_arguments(parser, args)
        self.model_options = options(args, "model") if isinstance(args, list) else []
        self.ckpt_path = self.config[self.config["subcommand"]].pop("ckpt_path", None)

    def before_instantiate_classes(self) -> None:
        """Put the checkpoint's hyper-parameters on top of files, the options on top of those; tell what these change.

        Raises:
            SystemExit: if the file is no checkpoint, or not of this task.
        """
        command = str(self.subcommand)
        if self.ckpt_path is not None and not Path(self.ckpt_path).exists() and not KEYWORD.match(self.ckpt_path):
            self.parser.error(f"ckpt_path {self.ckpt_path!r} does not exist")
        if self.ckpt_path is None and command != "fit" and self._untrained(command):
            self.parser.error(f"ckpt_path must be given for {command}, got none: the weights would be random")
        if self.ckpt_path is not None and Path(self.ckpt_path).exists():
            self._add_hyper_parameters(command, self.ckpt_path)
            stored = dict(self.config.items())
            self.config = self.parser.parse_args([command, *self.model_options], self.config)
            for name, value in self.config.items():
                if value != stored.get(name):
                    rank_zero_info(
                        f"{name.removeprefix(f'{command}.')}: {brief(value)} of the command line replaces the "
                        f"checkpoint's {brief(stored.get(name))}"
                    )
        self.config[command]["ckpt_path"] = self.ckpt_path

    def _untrained(self, command: str) -> bool:
        """Whether nothing but a checkpoint could bring the weights that are asked for: initial weights are trained, and
        tokens are the tokenizers' alone."""
        model, data = (self.config[command][part].get("init_args", {}) for part in ("model", "data"))
        tokens = command == "predict" and data.get("predict") == "tokens"
        return not tokens and model.get("initial_weights") is None

    def _add_hyper_parameters(self, command: str, ckpt_path: str) -> None:
        sharding = "ModelParallelStrategy" in str(self.config[command]["trainer"]["strategy"])
        file = Path(ckpt_path, SHARDED_PLAIN) if sharding and Path(ckpt_path).is_dir() else ckpt_path
        try:
            found = read_checkpoint(file).get("hyper_parameters", {})
        except ValueError as error:
            self.parser.error(str(error))
        configured = self.config[command]["model"]["class_path"]
        # a run of Trainer in Python keeps no class; names with an underscore are Lightning's own
        kind = found.get("_class_path") or configured
        if not related(kind, configured):
            self.parser.error(f"ckpt_path {str(ckpt_path)!r} is of {kind}, model is {configured}")
        arguments = {name: value for name, value in found.items() if not name.startswith("_")}
        self.config = self.parser.parse_object(
            {command: {"model": {"class_path": kind, "init_args": arguments}}}, self.config
        )

    def load_weights_only(self) -> None:
        """Have checkpoints read as tensors and plain values, never as code."""
        self.config_init[self.subcommand]["weights_only"] = True

    before_fit = before_validate = before_test = before_predict = load_weights_only

    def instantiate_classes(self) -> None:
        """Report what a constructor refused, a source without data, or a device that is not there as a command-line
        error, not as a traceback."""
        try:
            super().instantiate_classes()
            if self.subcommand != "predict" or getattr(self.datamodule, "predict", "samples") == "tokens":
                getattr(self.datamodule, "class_names", None)
        except ValueError as error:
            root: BaseException = error
            while isinstance(root.__cause__, ValueError):
                root = root.__cause__
            self.parser.error(str(root))
        except MisconfigurationException as error:
            trainer = self.config[self.subcommand]["trainer"]
            self.parser.error(f"{error} (trainer.accelerator {trainer.accelerator}, devices {trainer.devices})")


def link_views(parser: LightningArgumentParser) -> None:
    """Have a configuration's task take the schedule and the point-spread function of its data module."""
    for leaf in ("patch_nums", "patch_size", "focus_states", "max_radius", "schedule"):
        parser.link_arguments(f"data.init_args.schedule.{leaf}", f"model.init_args.schedule.{leaf}")
    parser.link_arguments("data.init_args.psf", "model.init_args.psf")


def related(one: str, other: str) -> bool:
    """Whether one of two classes is the other or a subclass of it."""
    a, b = locate(one), locate(other)
    if not isinstance(a, type) or not isinstance(b, type):
        return one == other
    return issubclass(a, b) or issubclass(b, a)


def brief(value: object) -> str:
    """For a message: descriptions of networks are long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def options(args: list[str], name: str) -> list[str]:
    """Those of the arguments that set ``--<name>`` or a part of it, with their values."""
    own = re.compile(rf"--{name}([.=].*)?")
    places = (i for i, arg in enumerate(args) if own.fullmatch(arg))
    return [part for i in places for part in args[i : i + 1 + ("=" not in args[i])]]


UPSTREAM_NOISE = (
    "LightningCLI's args parameter",  # the quickstart runs the command line from within
    "Total length of .list. across ranks is zero",  # there may be no validation data
    "Found .* module.* in eval mode",  # the frozen tokenizers are meant to be
    ".*isinstance.treespec, LeafSpec",  # Lightning's own use of torch
    "You're using the WeightAveraging callback with a model that overrides",  # it is not sharded by DDP
    "FSDP2-wrapped module .* returned a view",  # which nothing writes to
)


def main(
    args: list[str] | None = None, also: Mapping[str, str] | None = None, callbacks: Sequence[Callback] = ()
) -> FVARCommandLine:
    """Run `fvar fit | validate | test | predict` with the given arguments, those of the process by default.

    Args:
        args: of the command line.
        also: further commands and what they do, for the help.
        callbacks: of the trainer, beside those that the arguments name.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    if not torch.cuda.is_available():
        keep_memory()
    for message in UPSTREAM_NOISE:
        warnings.filterwarnings("ignore", message=message)
    others = "; ".join(f"'fvar {name}': {what}" for name, what in (also or {}).items())
    return FVARCommandLine(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "fvar",
            "allow_abbrev": False,
            "epilog": f"Also, each with --help: {others}." if others else None,
        },
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": list(callbacks)},
        args=sys.argv[1:] if args is None else args,
    )


def configs() -> Path:
    """Folder of the configurations that come with the package."""
    here = Path(__file__).parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parents[1] / "configs"
