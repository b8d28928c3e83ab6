"""Three training steps of a task, weights written by rank 0; test_distributed.py runs it in one and in two processes.

Usage: distributed_worker.py STRATEGY FOLDER TOKENIZER TOKENIZER

Strategy ddp trains every task and writes TASK.ckpt; fsdp stage 2 alone, and once more as the configurations ship it,
with its sharded checkpoint, shipped.ckpt, and samples. Strategy resume goes on from such a checkpoint, one.ckpt, and
writes it once more, again.ckpt.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.transformer import losses

SCHEDULE = FocusSchedule((1, 2, 4), patch_size=4, focus_states=2)
TOTAL = 8
TASKS = ("structure", "alias", "fvar")


class FixedImages(LightningDataModule):
    """Eight fixed images: the first four to rank 0, the others to rank 1, or all to one process; in so many passes."""

    schedule = SCHEDULE

    def __init__(self, passes: int = 1) -> None:
        super().__init__()
        self.passes = passes

    def train_dataloader(self) -> DataLoader:
        images = torch.rand(TOTAL, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        data = list(zip(images, torch.arange(TOTAL) % 2, strict=True))
        share = TOTAL // self.trainer.world_size
        first = share * self.trainer.global_rank
        return DataLoader(data, share // self.passes, sampler=range(first, first + share))

    def on_after_batch_transfer(self, batch: list[torch.Tensor], dataloader_idx: int) -> ImageBatch:
        images, labels = batch
        refocus = Refocus(SCHEDULE)
        blurred = refocus.blur(images)
        return ImageBatch(images, labels, refocus.views(images, blurred), blurred)


def sgd(params: object, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr)


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)


def make_task(name: str, tokenizers: list[str], **options: Any) -> LightningModule:
    torch.manual_seed(0)
    if name == "fvar":
        losses.CHUNK = 16  # several of a batch
        quiet = {"drop_path_rate": 0.0, "label_dropout": 0.0}
        return FVARTask(*tokenizers, num_classes=2, depth=3, width=32, heads=2, optimizer=adamw, **quiet | options)
    shared = {"z_channels": 4, "ch": 8, "num_res_blocks": 1, "warmup_steps": 1, "revive_after": 1, "optimizer": sgd}
    if name == "alias":
        return AliasTokenizerTask(SCHEDULE, vocab_size=8, l1_weight=0.2, **shared | options)
    quiet = {"noise": (0.0, 0.0), "scale_dropout": 0.0}
    # more codes than a step uses, so that idle ones are revived
    return TokenizerTask(SCHEDULE, vocab_size=64, ch_mult=(1, 1, 2), norm_groups=1, **shared | quiet | options)


def make_trainer(strategy: Any, precision: str, devices: int, passes: int, folder: Path, steps: int = 3) -> Trainer:
    return Trainer(
        accelerator="cpu", precision=precision, devices=devices, strategy=strategy, max_steps=steps,
        accumulate_grad_batches=passes, gradient_clip_val=0.5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip


def fsdp(devices: int, **options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(devices, tensor_parallel_size=1, process_group_backend="gloo", **options)


def run(name: str, strategy: str, precision: str, output: Path, tokenizers: list[str]) -> None:
    """Stage 2 with AdamW and accumulation; all with clipped gradients."""
    plan = {
        "single": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp": fsdp(2, save_distributed_checkpoint=False),
    }[strategy]
    passes = 2 if name == "fvar" else 1
    trainer = make_trainer(plan, precision, 1 if strategy == "single" else 2, passes, output.parent)
    options: dict[str, Any] = {"deferred": True} if strategy == "fsdp" else {}
    if name != "fvar":
        options["optimizer"] = partial(sgd, lr=1.0)  # clipped steps so long that codes are left unused
    trainer.fit(make_task(name, tokenizers, **options), FixedImages(passes))
    trainer.save_checkpoint(output, weights_only=False)


def ship(processes: int, output: Path, tokenizers: list[str], resume: Path | None = None, steps: int = 3) -> FVARTask:
    """Stage 2 as the configurations have it; `output` is a folder with every process's part."""
    task = make_task(
        "fvar", tokenizers, deferred=True, drop_path_rate=0.3, label_dropout=0.1, trunk="separate", shared_aln=True
    )
    trainer = make_trainer(fsdp(processes), "bf16-mixed", processes, 2, output.parent, steps)
    trainer.fit(task, FixedImages(2), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(output)
    return task


if __name__ == "__main__":
    strategy, place, *tokenizers = sys.argv[1:]
    folder = Path(place)
    if strategy == "ddp":
        for name in TASKS:
            run(name, "ddp", "64-true", folder / f"{name}.ckpt", tokenizers)
    if strategy == "fsdp":
        run("fvar", "fsdp", "32-true", folder / "fvar.ckpt", tokenizers)
        shipped = ship(2, folder / "shipped.ckpt", tokenizers)
        samples = shipped.generate(torch.tensor([0, 1]), seeds=[1, 2])
        torch.save(samples, folder / f"samples{shipped.global_rank}.pt")
    if strategy == "resume":
        ship(2, folder / "again.ckpt", tokenizers, resume=folder / "one.ckpt")
