"""What the teacher costs: a stage-2 step with the shared trunk against the plain student's step, interleaved."""

import statistics
import time
from pathlib import Path

import pytest
import torch
from size import TINY
from torch import Tensor

from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tokenizer.build import build_tokenizer

VOCAB, BATCH = 4096, 2
DEPTH, WIDTH, HEADS, ROUNDS = (2, 64, 1, 1) if TINY else (16, 512, 8, 5)


def write_tokenizer(kind: str, path: Path) -> str:
    description = {
        "kind": kind,
        "schedule": {"patch_nums": FocusSchedule().patch_nums},
        "vocab_size": VOCAB if kind == "structure" else 512,
        "z_channels": 32,
        "ch": 8,
    }
    tokenizer = build_tokenizer(**description)
    tokenizer.codebook.step()  # a tokenizer without codes is refused
    weights = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}
    torch.save({"tokenizer": description, "state_dict": weights}, path)
    return str(path)


def make_task(folder: Path, weight: float) -> FVARTask:
    paths = [write_tokenizer(kind, folder / f"{kind}.ckpt") for kind in ("structure", "alias")]
    return FVARTask(
        *paths,
        num_classes=1000,
        depth=DEPTH,
        width=WIDTH,
        heads=HEADS,
        teacher_loss_weight=weight,
        feature_weight=weight,
        logit_weight=weight / 2,
    ).train()


def step(task: FVARTask, batch: TokenBatch) -> float:
    start = time.perf_counter()
    task.zero_grad()
    task.losses(batch)["loss"].backward()
    return time.perf_counter() - start


@pytest.mark.benchmark
def test_shared_teacher_costs_at_most_a_third(tmp_path: Path) -> None:
    plain, taught = make_task(tmp_path, 0.0), make_task(tmp_path, 1.0)
    generator = torch.Generator().manual_seed(0)

    def maps(vocab: int) -> list[Tensor]:
        sides = FocusSchedule().patch_nums
        return [torch.randint(vocab, (BATCH, n * n), generator=generator) for n in sides]

    batch = TokenBatch(maps(VOCAB), maps(512), torch.zeros(BATCH, dtype=torch.long))
    step(plain, batch), step(taught, batch)
    pairs = [(step(plain, batch), step(taught, batch)) for _ in range(ROUNDS)]
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"\ndepth {DEPTH}, width {WIDTH}: plain {statistics.median(a for a, _ in pairs):.2f} s, ratio {ratio:.2f}")
    assert TINY or ratio <= 1.3
