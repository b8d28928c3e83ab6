"""What notebooks 03 and 04 begin with: tokenizers of 32 px and their tokens, made on a CPU in less than a minute."""

import logging
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning import LightningModule, Trainer, seed_everything
from matplotlib.axes import Axes
from torch import Tensor
from torch.utils.data import DataLoader

from fvar_lightning import AliasTokenizerTask, FocusSchedule, FVARTask, ImageDataModule, TokenizerTask

SCHEDULE = FocusSchedule(patch_nums=(1, 2, 4, 8), patch_size=4, focus_states=4, schedule="nyquist")


def quiet() -> None:
    """Plots in one style, and no messages of the trainer."""
    warnings.filterwarnings("ignore")
    for part in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(part).setLevel(logging.ERROR)
    plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    seed_everything(0, verbose=False)


def show(ax: Axes, image: Tensor, title: str = "") -> None:
    """Draw a (3, h, w) tensor in [-1, 1]."""
    ax.imshow((image.detach().permute(1, 2, 0) + 1).clamp(0, 2) / 2, interpolation="nearest")
    ax.set_title(title)
    ax.axis("off")


def photographs(source: str = "photographs") -> ImageDataModule:
    """Crops of 32 px: of the eight photographs, or of a folder."""
    return ImageDataModule(
        source, image_size=32, schedule=SCHEDULE, batch_size=8, crops_per_photograph=100, num_workers=0
    )


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW, fast."""
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)


def fit(task: LightningModule, data: Any, steps: int, path: str | Path | None = None) -> None:
    """Train on a data module, or on a list of batches; leaves a checkpoint at the path."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(data, batch_size=None, shuffle=True) if isinstance(data, list) else data)
    if path is not None:
        trainer.save_checkpoint(path)
    task.eval()


def tokenizers(data: ImageDataModule, folder: Path) -> dict[str, str]:
    """Both, trained: arguments of `FVARTask`."""
    codes = {"vocab_size": 128, "warmup_steps": 30, "revive_after": 20, "optimizer": optimizer}
    network = {"z_channels": 16, "ch": 16, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "norm_groups": 4}
    paths = {"structure_tokenizer": str(folder / "structure.ckpt"), "alias_tokenizer": str(folder / "alias.ckpt")}
    fit(TokenizerTask(SCHEDULE, **codes, **network, l1_weight=1.0), data, 100, paths["structure_tokenizer"])
    fit(AliasTokenizerTask(SCHEDULE, **codes, z_channels=32, ch=64), data, 100, paths["alias_tokenizer"])
    return paths


def tokens(task: FVARTask, data: ImageDataModule) -> tuple[list, list]:
    """Batches of tokens of all training and validation crops."""
    loaders = (data.train_dataloader(), data.val_dataloader())
    train, val = ([task.tokens(data.on_after_batch_transfer(batch, 0)) for batch in loader] for loader in loaders)
    return train, val
