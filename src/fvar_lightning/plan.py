"""`fvar plan`: what a configuration will take, before it is run: parameters, work, memory, time."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from fvar_lightning.cli import configs, link_views
from fvar_lightning.data.modules import ImageDataModule, TokenDataModule
from fvar_lightning.tasks.cost import Cost, step_cost
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.weights.checkpoints import load_tokenizer
from fvar_lightning.weights.describe import describe

GIB = 2**30
AUTOCAST = {"32": None, "32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Assumptions:
    """Machine and data that the configuration does not tell.

    Args:
        gpus: in all; by default `devices` times `num_nodes` of the trainer, 8 devices where it leaves them open.
        memory: of each, in GiB.
        reserve: part of it that CUDA, NCCL and fragmentation take.
        tflops: peak of each in the precision of training, in 10^12 operations a second; frozen networks, which compute
            in float32, reach half of it (TF32).
        utilisation: part of the peak that training reaches.
        images: in an epoch.
        classes: of the images.
        structure: configuration that stands for a structure tokenizer whose checkpoint is not there.
        alias: the same for an alias tokenizer.
    """

    gpus: PositiveInt | None = None
    memory: PositiveFloat = 80.0
    reserve: ClosedUnitInterval = 0.1
    tflops: PositiveFloat = 312.0
    utilisation: PositiveFloat = 0.4
    images: PositiveInt = 1_281_167
    classes: PositiveInt = 1000
    structure: str = "tokenizer/structure_base.yaml"
    alias: str = "tokenizer/alias_base.yaml"


@dataclass(frozen=True)
class Plan:
    """What `fvar plan` finds. Memory is of one GPU, in bytes."""

    name: str
    parameters: dict[str, int]
    tokens: int
    """An image."""
    precision: str
    strategy: str
    gpus: int
    batch_size: int
    accumulate: int
    steps: int
    trained_flops: float
    """An image, both passes."""
    frozen_flops: float
    """An image, of frozen tokenizers."""
    memory: dict[str, int]
    available: int
    largest_batch: int
    seconds: float
    notes: list[str]

    @property
    def global_batch(self) -> int:
        """Images of a step of the optimiser."""
        return self.gpus * self.batch_size * self.accumulate

    @property
    def used(self) -> int:
        """Sum of the memory."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.used <= self.available
