"""fvar plan: its figures against steps that really run, against CUDA's autocast, and against formulas."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fvar_lightning.__main__ import run
from fvar_lightning.activations import saved_bytes
from fvar_lightning.cli import configs
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.planning.command import Planner
from fvar_lightning.planning.cost import step_cost
from fvar_lightning.planning.dry_run import LikeCUDA, Meter, backward
from fvar_lightning.planning.layout import Layout, largest_batch, memory
from fvar_lightning.planning.plan import Plan
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.transformer.var import VAR

SCHEDULE = FocusSchedule((1, 2, 4, 8), patch_size=8, max_radius=5.0)
BATCH = 4
NETWORK = {"vocab_size": 256, "ch": 16, "ch_mult": [1, 1, 2, 2], "norm_groups": 4}
STRUCTURE = {"kind": "structure", "schedule": SCHEDULE, **NETWORK}
ALIAS = {"kind": "alias", "schedule": SCHEDULE, "vocab_size": 64, "ch": 32}
VAR_SIZES = {"depth": 4, "width": 128, "heads": 2, "num_classes": 10}
TASKS: dict[str, tuple[type, dict[str, Any]]] = {
    "stage 2": (FVARTask, {"structure_tokenizer": STRUCTURE, "alias_tokenizer": ALIAS, **VAR_SIZES}),
    "recomputed": (
        FVARTask,
        {"structure_tokenizer": STRUCTURE, "alias_tokenizer": ALIAS, "recompute": True, "trunk": "separate"} | VAR_SIZES,
    ),
    "plain VAR": (
        FVARTask,
        {"structure_tokenizer": STRUCTURE, "teacher_loss_weight": 0.0, "feature_weight": 0.0, "logit_weight": 0.0}
        | {"shared_aln": True, "attn_l2_norm": False}
        | VAR_SIZES,
    ),
    "alias": (AliasTokenizerTask, {"schedule": SCHEDULE, "ch": 32}),
    "structure": (TokenizerTask, {"schedule": SCHEDULE, **NETWORK}),
    "perceptual": (TokenizerTask, {"schedule": SCHEDULE, "perceptual": "efficientnet_lite1", **NETWORK}),
    "adversarial": (
        TokenizerTask,
        {"schedule": SCHEDULE, "adversarial_weight": 0.5, "texture_weight": 1.0, "discriminator_ch": 16, **NETWORK},
    ),
}


def make_task(name: str, device: str = "meta") -> Any:
    kind, arguments = TASKS[name]
    torch.manual_seed(0)
    with torch.device(device):
        return kind(**arguments)


def real_task(name: str) -> Any:
    """On the CPU, its codes taken as set."""
    task = make_task(name, "cpu")
    if isinstance(task, TokenizerTask):
        task.load_perceptual()
        task.adversarial_start = 0.0
    codebook = task.vae.codebook if isinstance(task, FVARTask) else task.tokenizer.codebook
    codebook.updates.fill_(2**40)
    return task


def data() -> ImageDataModule:
    return ImageDataModule(image_size=SCHEDULE.image_size, schedule=SCHEDULE)


def real_batch() -> Any:
    side = SCHEDULE.image_size
    pixels = torch.randint(256, (BATCH, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data().on_after_batch_transfer([pixels, torch.arange(BATCH)], 0)


def loss_of(task: Any, batch: Any) -> Tensor:
    batch = task.tokens(batch) if isinstance(task, FVARTask) else batch
    return task.losses(batch, torch.Generator().manual_seed(0))["loss"]


@pytest.mark.parametrize("name", TASKS)
def test_work_and_optimiser_are_those_of_a_real_step(name: str) -> None:
    planned = step_cost(make_task(name), data(), BATCH, None)
    task, batch = real_task(name), real_batch()
    # torch counts no fused attention on CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(task, batch).backward()
    assert planned.flops + planned.frozen_flops == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert (planned.frozen_flops > 0) == isinstance(task, FVARTask)
    optimizer = task.optimizer_factory(task.parameters_to_train())
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    assert planned.states == pytest.approx(sum(x.nbytes for x in states), rel=1e-3)
    trained = sum(p.nbytes for p in task.parameters() if p.requires_grad)
    assert planned.states == pytest.approx(2 * trained, rel=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_float32_keeps_what_a_real_step_keeps(name: str) -> None:
    planned = step_cost(make_task(name), data(), BATCH, None)
    task, batch = real_task(name), real_batch()
    batch = task.tokens(batch) if isinstance(task, FVARTask) else batch
    given = sum(x.nbytes for x in batch.images_and_views()) if hasattr(batch, "images_and_views") else 0
    networks = [task, *getattr(task, "_perceptual", [])]
    generator = torch.Generator().manual_seed(0)
    kept = saved_bytes(lambda: task.losses(batch, generator)["loss"], *networks)
    print(name, planned.kept, kept, planned.kept / kept, given)
    assert planned.half_weights == 0
    assert planned.kept == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("name", [name for name, (kind, _) in TASKS.items() if kind is FVARTask])
def test_half_precision_keeps_what_a_real_step_keeps(name: str) -> None:
    planned = step_cost(make_task(name), data(), BATCH, torch.bfloat16)
    task, batch = real_task(name), real_batch()
    tokens = task.tokens(batch)
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: task.losses(tokens, generator)["loss"], task)
    print(name, planned.kept + planned.half_weights, kept, (planned.kept + planned.half_weights) / kept)
    assert planned.kept + planned.half_weights == pytest.approx(kept, rel=0.1)


class Fused(TorchFunctionMode):
    """Without a GPU torch chooses unfused attention for tensors that claim to be on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which without a GPU does nothing."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "adversarial"])
def test_half_precision_keeps_what_cudas_autocast_keeps(name: str) -> None:
    planned = step_cost(make_task(name), data(), BATCH, torch.bfloat16)
    task = make_task(name)
    task.eval()
    if isinstance(task, TokenizerTask):
        task.load_perceptual()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        networks = [task, *getattr(task, "_perceptual", [])]
        for network in networks:
            network.to_empty(device="cuda")
        if not isinstance(task, FVARTask):
            task.tokenizer.codebook.updates = torch.tensor(2**40, device="cpu")
        side = SCHEDULE.image_size
        pixels, labels = torch.empty(BATCH, 3, side, side, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.long)
        batch = data().on_after_batch_transfer([pixels, labels], 0)
        generator = torch.Generator("cpu").manual_seed(0)
        with cuda_autocast(), Fused():
            batch = task.tokens(batch) if isinstance(task, FVARTask) else batch
            kept = saved_bytes(lambda: task.losses(batch, generator)["loss"], *networks)
    print(name, planned.kept + planned.half_weights, kept, (planned.kept + planned.half_weights) / kept)
    assert planned.kept + planned.half_weights == pytest.approx(kept, rel=0.01)
