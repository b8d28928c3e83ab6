"""Runs of `fvar fit` that a test can kill; test_faults.py forks them from a process that has imported everything."""

import math
import os
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from fvar_lightning.cli import main

PULSE: list[Connection] = []


class Pulse(Callback):
    """Tells the test where the run is: before every step, and where a checkpoint is about to be written."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        tell(trainer, "step")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        tell(trainer, "save")


def tell(trainer: Trainer, event: str) -> None:
    if trainer.is_global_zero:
        PULSE[0].send(event)


def fit(args: list[str], rank: int, port: int, log: str, pulse: Connection) -> None:
    """One process of a run, rank 0 of one or any of two; what it prints goes to the log."""
    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(file, output)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    PULSE[:] = [pulse]
    main(args)


class Poison(Callback):
    """Makes the loss of one rank NaN from a micro-batch on."""

    def __init__(self, rank: int, micro_batch: int) -> None:
        self.rank, self.left = rank, micro_batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.left == 0 and trainer.global_rank == self.rank:
            pl_module.teacher_loss_weight = math.nan
        self.left -= 1
