"""Tiny tasks, data and trainers for the evaluation tests; also run by them in two processes.

Usage: evaluation_worker.py STRATEGY IMAGES ROOT: tests and predicts with two processes into ROOT.
"""

import sys
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.nn import functional as F

from fvar_lightning.callbacks import AliasMetrics, GenerationMetrics, TeacherGap
from fvar_lightning.callbacks.tokens import TokenWriter
from fvar_lightning.callbacks.writers import SampleWriter
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.metrics.extractors import FeatureExtractor, Features
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tokenizer.build import build_tokenizer

LAYOUT = {"patch_nums": (1, 2, 4), "patch_size": 4, "focus_states": 2, "max_radius": 0.75, "schedule": "cosine"}
SAMPLES = 7


class TinyExtractor(FeatureExtractor):
    """Twelve block means as features, three of them as logits."""

    def __init__(self, name: str = "tiny") -> None:
        super().__init__(name, 12)
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def extract(self, images: Tensor) -> Features:
        features = F.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 255 * self.weight
        return Features(features, 10 * features[:, :3])


def write_tokenizers(root: Path) -> list[str]:
    """Random tokenizers whose decoder uses its input."""
    paths = []
    for kind in ("structure", "alias"):
        description = {"kind": kind, "schedule": LAYOUT, "vocab_size": 8, "z_channels": 4, "ch": 8, "num_res_blocks": 1}
        if kind == "structure":
            description["ch_mult"] = [1, 1, 2]
        torch.manual_seed(0)
        tokenizer = build_tokenizer(**description)
        tokenizer.codebook.step()
        path = root / f"{kind}.ckpt"
        weights = {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
        torch.save({"tokenizer": description, "state_dict": weights}, path)
        paths.append(str(path))
    return paths


def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def make_task(tokenizers: list[str], **options: object) -> FVARTask:
    torch.manual_seed(0)
    sizes = {"num_classes": 2, "depth": 2, "width": 32, "heads": 2, "class_names": ["blue", "red"]}
    task = FVARTask(*tokenizers, optimizer=sgd, **(sizes | options))
    torch.nn.init.normal_(task.student.head.weight, std=0.3)
    return task


def make_taught_task(tokenizers: list[str], **options: object) -> FVARTask:
    """Whose teacher has something of its own to say."""
    task = make_task(tokenizers, **options)
    for block in task.teacher.blocks:
        torch.nn.init.normal_(block.cross.proj.weight)
    return task


def make_data(source: Path, **options: object) -> ImageDataModule:
    defaults = {"batch_size": 2, "num_workers": 0, "val_fraction": 0.2, "samples_per_class": 4}
    return ImageDataModule(str(source), image_size=16, schedule=FocusSchedule(**LAYOUT), **(defaults | options))


def make_trainer(root: Path, callbacks: list[Callback], **options: object) -> Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "logger": CSVLogger(root, name="logs", version=0), "max_epochs": 1,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1, "default_root_dir": root, "use_distributed_sampler": False,
    }  # fmt: skip
    return Trainer(callbacks=callbacks, **(defaults | options))


def evaluation_callbacks(root: Path) -> list[Callback]:
    metrics = GenerationMetrics(
        SAMPLES, TinyExtractor, cache=str(root / "cache"), report=str(root / "report.json"), batch_size=2
    )
    return [metrics, AliasMetrics(num_samples=1), TeacherGap()]


def run(root: Path, images: Path, strategy: str = "single") -> None:
    """Test into report.json, predict into samples and tokens: what one process and two must agree in."""
    tokenizers = [str(root.parent / f"{kind}.ckpt") for kind in ("structure", "alias")]
    trainer = make_trainer(root, evaluation_callbacks(root), **processes(strategy))
    trainer.test(make_taught_task(tokenizers), make_data(images))
    trainer = make_trainer(root, [SampleWriter(str(root / "samples"), output="both")], **processes(strategy))
    trainer.predict(make_task(tokenizers), make_data(images, batch_size=3, samples_per_class=3))
    trainer = make_trainer(root, [TokenWriter(str(root / "tokens"), rows_per_shard=3)], **processes(strategy))
    trainer.predict(make_task(tokenizers), make_data(images, batch_size=4, predict="tokens", crops_per_image=2))


def processes(strategy: str) -> dict[str, object]:
    """Arguments of the trainer; a strategy serves one trainer alone."""
    made: dict[str, Strategy | str] = {
        "single": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo",
                                      save_distributed_checkpoint=False),
    }  # fmt: skip
    return {"devices": 1 if strategy == "single" else 2, "strategy": made[strategy]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[3]), Path(sys.argv[2]), sys.argv[1])
