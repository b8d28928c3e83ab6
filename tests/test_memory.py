"""Every configuration of a model fits the GPUs its header names, with the batch and the learning rate it states."""

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvar_lightning.cli import configs
from fvar_lightning.transformer.losses import feature_loss, token_losses
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR

GIB = 2**30
MODELS = sorted(path.name for path in configs().glob("fvar_d*.yaml"))


class Peak(TorchDispatchMode):
    """How many bytes of tensors are alive at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages:
            return

        def freed(_: object) -> None:
            self.alive -= size
            del self.storages[address]

        self.storages[address] = weakref.ref(storage, freed)
        self.alive += size
        self.most = max(self.most, self.alive)


def counted(batch: int, patch_nums: list[int], depth: int, width: int, **options: bool) -> tuple[int, int, int]:
    """Bytes of a step under bf16 autocast beyond weights and gradients; parameters in blocks, and others."""
    with torch.device("meta"):
        student = VAR(patch_nums, vocab_size=8192, depth=depth, width=width, **options)
        teacher = HighFrequencyTeacher(student, alias_channels=64)
    parameters = [*student.parameters(), *teacher.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        teacher.to_empty(device="cpu")
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        labels = torch.zeros(batch, dtype=torch.long)
        length = student.layout.length
        inputs, alias = torch.empty(batch, length - 1, 32), torch.empty(batch, length, 64)
        with Peak() as peak:
            for parameter in parameters:
                peak.count(parameter)
                peak.count(parameter.grad)
            before = peak.alive
            with torch.autocast("cpu", torch.bfloat16):
                trace = student.trace(labels, inputs)
                taught = teacher(student, trace, labels, inputs, alias)
                readout = student.readout(trace.hidden[-1], trace.condition)
                targets = torch.zeros(batch, length, dtype=torch.long)
                loss = token_losses(targets, readout, taught.readout).sum()
                loss = loss + feature_loss(trace.hidden[-1:], taught.hidden[-1:])
            loss.backward()
    blocks = sum(p.numel() for block in (*student.blocks, *teacher.blocks) for p in block.parameters())
    return peak.most - before, blocks, sum(p.numel() for p in parameters) - blocks


def memory(batch: int, patch_nums: list[int], depth: int, sharded: bool, **options: bool) -> float:
    """GiB of each of eight GPUs: measured at depths 3 and 4, and both are linear in the depth."""
    low, high = (counted(batch, patch_nums, n, 64 * depth, **options) for n in (3, 4))
    step, blocks, rest = (a + (depth - 3) * (b - a) for a, b in zip(low, high, strict=True))
    tokenizers = 0.45 * GIB
    # weights, gradients and AdamW's two states; DistributedDataParallel keeps gradients twice
    held = 16 / 8 * (blocks + rest) if sharded else 20 * (blocks + rest)
    # gathered: a block at work, the next one, and what is in no block, in bf16, and their gradients
    gathered = (2 * (high[1] - low[1]) + rest) * 6 if sharded else 0
    # FSDP2 gathers bf16 and drops it with the block; autocast keeps a copy of all weights
    halves = 2 * blocks if sharded and not options.get("recompute") else 0
    return (held + gathered + tokenizers + step - halves) / GIB


def read(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A configuration, its data, and its header in one line."""
    text = (configs() / name).read_text()
    content = yaml.safe_load(text)
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    return content, yaml.safe_load(Path(configs() / content["data"]).read_text())["init_args"], header


# the others are slow
QUICK = ("fvar_d16_256.yaml", "fvar_d36_512.yaml")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in MODELS])
def test_a_model_takes_the_memory_its_header_states(name: str) -> None:
    content, data, header = read(name)
    model = content["model"]["init_args"]
    stated = float(re.search(r"([\d.]+) GiB a GPU", header)[1])
    options = {key: model[key] for key in ("shared_aln", "recompute") if key in model}
    patch_nums, sharded = data["schedule"]["patch_nums"], "fsdp2" in header
    found = memory(data["batch_size"], patch_nums, model["depth"], sharded, **options)
    assert 0.9 * stated < found < 1.02 * stated
    assert stated < 0.9 * 80 * 1e9 / GIB


@pytest.mark.parametrize("name", MODELS)
def test_batch_and_learning_rate_are_those_of_the_header(name: str) -> None:
    content, data, header = read(name)
    trainer, optimizer = content["trainer"], content["model"]["init_args"]["optimizer"]["init_args"]
    gpus, images = map(int, re.search(r"(\d+) GPUs of 80 GB x (\d+) images", header).groups())
    total = int(re.search(r"= (\d+) a step", header)[1])
    rate = float(re.search(r"Learning rate (\S+) per 256 images", header)[1])
    assert images == data["batch_size"]
    assert gpus * images * trainer.get("accumulate_grad_batches", 1) == total
    assert optimizer["lr"] == pytest.approx(rate * total / 256)


def test_recomputed_blocks_make_room() -> None:
    patch_nums = read("fvar_d24_256.yaml")[1]["schedule"]["patch_nums"]
    assert memory(64, patch_nums, 24, sharded=False, recompute=True) < 40
