"""TeacherGap against the plain formulas on whole logits, from images and from cached tokens, compiled and in shares."""

import copy
import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation_worker import make_data, make_task, make_taught_task, make_trainer, write_tokenizers
from fvar_lightning.callbacks import TeacherGap
from fvar_lightning.callbacks.teacher_gap import gap_rows, gap_sums
from fvar_lightning.callbacks.tokens import TokenWriter
from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.transformer import losses

SIDES = (1, 2, 4)
NAMES = ["1x1", "2x2", "4x4", "all"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def make_tokens(images: int = 5) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    structure, alias = ([torch.randint(8, (images, n * n), generator=generator) for n in SIDES] for _ in range(2))
    return TokenBatch(structure, alias, torch.arange(images) % 2)


def plain(task: FVARTask, batch: TokenBatch, alias: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Cross-entropies (B, L) of student and teacher from whole logits, and the gates of all blocks (B, l, C), from
    what goes into the cross-attentions and what comes out: out = in + alpha * projected."""
    inputs, targets = task.vae.var_inputs(batch.structure), torch.cat(batch.structure, 1)
    crosses: list[tuple[Tensor, Tensor]] = []
    projected: list[Tensor] = []
    hooks = []
    for block in task.teacher.blocks:
        hooks.append(block.cross.register_forward_hook(lambda _, args, out: crosses.append((args[0], out))))
        hooks.append(block.cross.proj.register_forward_hook(lambda _, args, out: projected.append(out)))
    trace = task.student.trace(batch.labels, inputs)
    codes = task.alias_tokenizer.codes(torch.cat(alias, 1))
    taught = task.teacher(task.student, trace, batch.labels, inputs, codes)
    for hook in hooks:
        hook.remove()
    entropies = [
        F.cross_entropy(logits.mT, targets, reduction="none")
        for logits in (task.student(batch.labels, inputs), taught.readout.logits())
    ]
    gates = [(after - before) / added for (before, after), added in zip(crosses, projected, strict=True)]
    return entropies, gates


@torch.no_grad()
def test_figures_are_the_plain_formulas(tokenizers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 16)
    task, batch = make_taught_task(tokenizers).double().eval(), make_tokens()
    (student, teacher), gates = plain(task, batch, batch.alias)
    (_, shuffled), _ = plain(task, batch, [maps[[4, 0, 1, 2, 3]] for maps in batch.alias])
    rows = gap_rows(gap_sums(task, batch), SIDES)
    assert [row["scale"] for row in rows] == NAMES
    gate = torch.stack(gates).mean((0, -1))
    for row, part in zip(rows, [*task.student.layout.slices, slice(None)], strict=True):
        assert row["student"] == pytest.approx(student[:, part].mean().item(), rel=1e-9)
        assert row["teacher"] == pytest.approx(teacher[:, part].mean().item(), rel=1e-9)
        assert row["teacher_gap"] == pytest.approx((student - teacher)[:, part].mean().item(), abs=1e-9)
        assert row["teacher_gap_shuffled"] == pytest.approx((student - shuffled)[:, part].mean().item(), abs=1e-9)
        assert row["teacher_gate"] == pytest.approx(gate[:, part].mean().item(), rel=1e-6)
    assert abs(rows[-1]["teacher_gap"] - rows[-1]["teacher_gap_shuffled"]) > 1e-3


def test_scales_that_read_nothing_have_no_gate(tokenizers: list[str]) -> None:
    """The sharp one, own scale only, and the first where only two read."""
    task = make_taught_task(tokenizers, alias_scales=2, alias_context="own_scale").eval()
    gates = [row["teacher_gate"] for row in gap_rows(gap_sums(task, make_tokens()), SIDES)]
    assert gates[0] == gates[2] == 0
    assert 0 < gates[1] < 1


def test_a_batch_of_one_image_has_no_control(tokenizers: list[str]) -> None:
    task = make_taught_task(tokenizers).eval()
    alone, both = gap_sums(task, make_tokens(1)), gap_sums(task, make_tokens())
    assert gap_rows(alone, SIDES)[-1]["teacher_gap_shuffled"] != gap_rows(alone, SIDES)[-1]["teacher_gap_shuffled"]
    joined, control = (gap_rows(sums, SIDES)[-1]["teacher_gap_shuffled"] for sums in (alone + both, both))
    assert joined == control


def test_compiled_blocks_tell_the_same(tokenizers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C++ compiler
    torch._dynamo.reset()
    compiled = make_taught_task(tokenizers, compile=True).train()
    batch = make_tokens()
    compiled.losses(batch)["loss"].backward()
    plain = copy.deepcopy(compiled)
    plain.compile_blocks = False
    torch.testing.assert_close(gap_sums(compiled.eval(), batch), gap_sums(plain.eval(), batch))


def validate(task: FVARTask, data: Any, root: Path, **options: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
    trainer = make_trainer(root, [TeacherGap(**options)])
    trainer.validate(task, data, verbose=False)
    assert list((root / "logs" / "version_0" / "pictures").glob("val_teacher_gap-*.png"))
    with (root / "logs" / "version_0" / "teacher_gap.csv").open(newline="") as file:
        return {n: float(x) for n, x in trainer.callback_metrics.items()}, list(csv.DictReader(file))


def test_images_and_their_cached_tokens_have_the_same_gap(
    tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    task, images = make_taught_task(tokenizers), make_data(image_folder)
    cache = str(tmp_path / "tokens")
    writer = make_trainer(tmp_path / "writer", [TokenWriter(cache)])
    writer.predict(task, make_data(image_folder, predict="tokens", part="val"))
    figures, rows = validate(task, images, tmp_path / "images")
    assert [row["scale"] for row in rows] == NAMES
    for row in rows:
        for name in ("teacher_gap", "teacher_gap_shuffled", "teacher_gate"):
            assert float(row[name]) == pytest.approx(figures[f"val/{name}/{row['scale']}"], abs=1e-6)
    assert float(rows[-1]["student"]) == pytest.approx(figures["val/student"], rel=1e-5)
    assert float(rows[-1]["teacher"]) == pytest.approx(figures["val/teacher"], rel=1e-5)
    cached, _ = validate(task, TokenDataModule(cache, cache, batch_size=2, num_workers=0), tmp_path / "cached")
    # batches may round another way
    for name, value in figures.items():
        assert cached[name] == pytest.approx(value, abs=1e-4), name
    first, _ = validate(task, images, tmp_path / "first", max_batches=1)
    assert first["val/teacher_gap/all"] != figures["val/teacher_gap/all"]


def test_what_has_no_teacher_is_refused(tokenizers: list[str]) -> None:
    with pytest.raises(ValueError, match="max_batches must be at least 1, got 0"):
        TeacherGap(0)
    alone = make_task(tokenizers, teacher_loss_weight=0.0, feature_weight=0.0, logit_weight=0.0)
    with pytest.raises(ValueError, match="needs a teacher: teacher_loss_weight must be positive, got 0"):
        TeacherGap().setup(None, alone, "fit")
