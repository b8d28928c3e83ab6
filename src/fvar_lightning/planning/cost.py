"""What a training step takes on a GPU, counted by a step of the task itself on tensors without memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.planning.dry_run import LikeCUDA, Meter, backward
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.stage1 import Stage1Task
from fvar_lightning.tasks.tokenizer import TokenizerTask


class Cost(NamedTuple):
    """Of a step of one process. Operations are multiplications and additions, memory is in bytes."""

    flops: int
    """Of the networks in training: forward, backward, and what is computed again."""
    frozen_flops: int
    """Of the frozen tokenizers, in float32."""
    batch: int
    """Images and their views, or tokens."""
    kept: int
    """What the forward pass keeps for the backward pass, but for the next."""
    half_weights: int
    """Half-precision copies of weights that it keeps."""
    peak: int
    """The most that exists at a time of batch, kept, half_weights and all else that the passes make."""
    states: int
    """Of the optimiser."""
    update: int
    """What the optimiser's step makes and frees again."""
    helpers: int
    """Weights of frozen networks of the losses."""


def step_cost(task: Any, data: ImageDataModule | None, batch_size: int, dtype: torch.dtype | None) -> Cost:
    """Of the step after the codes are set and, where there is a discriminator, after it has joined.

    The computation is that of a GPU, see `LikeCUDA`. Gradients are there all the time, as they are under accumulation.
    The codebook's upkeep, which is small, is left out.

    Args:
        task: `FVARTask` or a task of stage 1, on device meta.
        data: what makes images and views; ``None``: tokens from a cache.
        batch_size: images.
        dtype: of autocast; ``None``: float32 throughout.
    """
    _settle(task)
    trained = [p for p in task.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    there = [*task.parameters(), *task.buffers(), *(p.grad for p in trained if p.grad is not None)]
    meter, like_cuda, frozen_flops = Meter(there), LikeCUDA(), 0
    with meter, like_cuda, torch.device("meta"):
        batch = _batch(task, data, batch_size)
        loaded = meter.live
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            inputs = batch
            if isinstance(task, FVARTask):
                inputs = task.tokens(batch)
                frozen_flops = meter.flops
            loss = task.losses(inputs, torch.Generator("cpu").manual_seed(0))["loss"]
        half_weights = like_cuda.forget_weights()
        kept = meter.live - loaded - half_weights
        backward(loss)
    flops, peak = meter.flops - frozen_flops, meter.peak
    del loss, inputs, batch
    states, update = _update_cost(task, meter)
    return Cost(flops, frozen_flops, loaded, kept, half_weights, peak, states, update, meter.found)


def _settle(task: Any) -> None:
    """Bring the task to the state of the long run: codes set, all losses in force."""
    # in training mode codebooks are kept up, which asks for values
    task.eval()
    if isinstance(task, Stage1Task):
        task.tokenizer.codebook.updates = torch.tensor(2**62, device="cpu")
    if isinstance(task, TokenizerTask):
        task.load_perceptual()
        task.on_fit_start()  # to the device
        task.adversarial_start = 0.0


def _batch(task: Any, data: ImageDataModule | None, size: int) -> ImageBatch | TokenBatch:
    labels = torch.zeros(size, dtype=torch.long)
    if data is not None:
        side = data.schedule.image_size
        return data.on_after_batch_transfer([torch.empty(size, 3, side, side, dtype=torch.uint8), labels], 0)
    maps = [torch.zeros(size, n * n, dtype=torch.long) for n in task.vae.schedule.patch_nums]
    return TokenBatch(maps, [] if task.teacher is None else [torch.zeros_like(tokens) for tokens in maps], labels)


def _update_cost(task: Any, meter: Meter) -> tuple[int, int]:
    """Bytes of the optimiser's states, and what its step takes meanwhile."""
    optimizer = task.optimizer_factory(task.parameters_to_train())
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # as by default on GPUs
    before = meter.peak = meter.live
    with meter:
        optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.is_meta]
    states = sum(x.nbytes for x in kept)
    return states, meter.peak - before - states
