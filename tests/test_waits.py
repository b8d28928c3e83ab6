"""Optics, sampling and the step of stage 2 never wait for the device, and their shapes depend on no value.

`test_stage1.py` has the same of the steps of stage 1.
"""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from distributed_worker import SCHEDULE, FixedImages, make_task, sgd
from fvar_lightning.generation import sampling
from fvar_lightning.generation.sampling import generate
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.layers import KVCache
from fvar_lightning.transformer.var import VAR
from waits import Shapes, Waits


def models(seed: int = 0) -> tuple[VAR, VQVAE]:
    torch.manual_seed(seed)
    vae = VQVAE(SCHEDULE, vocab_size=32, z_channels=8, ch=8, ch_mult=(1, 1, 2), num_res_blocks=1).eval()
    var = VAR(SCHEDULE.patch_nums, vocab_size=32, z_channels=8, num_classes=2, depth=2, width=32).eval()
    nn.init.normal_(var.head.weight)
    return var, vae


@pytest.mark.parametrize("options", [{}, {"guidance": [0.0, 2.0, 0.0]}, {"more_smooth": True}, {"top_p": 0.0}])
def test_generating_looks_at_the_labels_and_at_nothing_else(options: dict[str, Any]) -> None:
    """Their lowest and highest, once a call: per scale it waits for nothing."""
    networks, labels = models(), torch.tensor([0, 1])
    with Waits() as waits:
        generate(*networks, labels, seeds=[1, 2], **options)
    assert waits.found == {"_local_scalar_dense": 2}


def test_the_cache_is_gone_when_the_decoder_needs_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (var, vae), caches = models(), []

    class Watched(KVCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(sampling, "KVCache", Watched)
    decode = vae.image
    monkeypatch.setattr(vae, "image", lambda f_hat: (alive.append(caches[-1]()), decode(f_hat))[1])
    alive: list[KVCache | None] = []
    generate(var, vae, torch.tensor([0, 1]), seeds=[1, 2])
    generate(var, vae, torch.tensor([0, 1]), seeds=[1, 2], focus=0.5)
    assert alive == [None, None]


def test_shapes_of_every_scale_depend_on_the_batch_alone() -> None:
    """So that what captures and replays them can."""

    def shapes(seed: int, classes: list[int]) -> Shapes:
        networks, labels = models(seed), torch.tensor(classes)
        with Shapes() as found:
            generate(*networks, labels, seeds=[seed, seed + 1], top_k=5)
        return found

    assert shapes(0, [0, 1]).found == shapes(7, [1, 1]).found


def test_refocusing_does_not_wait() -> None:
    refocus, images = Refocus(SCHEDULE), torch.rand(2, 3, SCHEDULE.image_size, SCHEDULE.image_size)
    refocus(images)  # the transfer functions come to the device
    with Waits() as waits:
        refocus(images)
    assert waits.found == {}


class Steps(Callback):
    """Counts in whole steps but for the first, with which the logging begins."""

    def __init__(self) -> None:
        self.waits, self.counted = Waits(), 0

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step:
            self.counted += 1
            self.waits.__enter__()

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if self.counted:
            self.waits.__exit__(None, None, None)


def step_options(**options: Any) -> dict[str, Any]:
    return {"drop_path_rate": 0.3, "label_dropout": 0.5, **options}


@pytest.mark.parametrize(
    "options", [step_options(), step_options(trunk="separate"), step_options(recompute=True)], ids=str
)
def test_a_step_of_stage_two_does_not_wait(options: dict[str, Any], tmp_path: Path) -> None:
    """Tokenising and logging included. (AdamW reads how many steps it has made, from memory of the host.)"""
    common = {"schedule": {"patch_nums": SCHEDULE.patch_nums, "patch_size": 4, "focus_states": 2}, "z_channels": 4}
    structure = {"kind": "structure", "vocab_size": 16, "ch": 8, "ch_mult": (1, 1, 2), **common}
    alias = {"kind": "alias", "vocab_size": 8, "ch": 8, **common}
    task: Any = make_task("fvar", [structure, alias], **options)  # type: ignore[list-item]
    task.optimizer_factory = sgd
    for tokenizer in (task.vae, task.alias_tokenizer):
        tokenizer.codebook.step()  # one without codes is refused
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=3, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[steps],
    )  # fmt: skip
    trainer.fit(task, FixedImages())
    assert steps.counted == 2
    assert steps.waits.found == {}
