"""Two gloo processes reach what one process reaches on the joined batch."""

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import distributed_worker
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tokenizer.codebook import Codebook
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint
from fvar_lightning.weights.files import read_checkpoint


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_processes(strategy: str, folder: Path, tokenizers: list[str]) -> None:
    """Lightning's own launcher starts the second process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    worker = str(Path(distributed_worker.__file__))
    command = [sys.executable, worker, strategy, str(folder), *tokenizers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tokenizers")
    paths = [root / f"{kind}.ckpt" for kind in ("structure", "alias")]
    for path in paths:
        distributed_worker.run(path.stem, "single", "32-true", path, [])
    return [str(path) for path in paths]


@pytest.fixture
def reviving(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each update of a codebook found unused codes, which are revived at once."""
    unused: list[bool] = []
    update = Codebook.update

    def watched(codebook: Codebook, pool: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> None:
        unused.append(len(torch.cat(list(indices)).unique()) < codebook.vocab_size)
        update(codebook, pool, indices)

    monkeypatch.setattr(Codebook, "update", watched)
    return unused


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory, tokenizers: list[str]) -> Path:
    """Folder of what two processes wrote that join their gradients."""
    folder = tmp_path_factory.mktemp("joint")
    two_processes("ddp", folder, tokenizers)
    return folder


@pytest.mark.parametrize("name", distributed_worker.TASKS)
def test_two_processes_equal_one(
    name: str, joint: Path, tmp_path: Path, tokenizers: list[str], reviving: list[bool]
) -> None:
    distributed_worker.run(name, "single", "64-true", tmp_path / "one.ckpt", tokenizers)
    assert any(reviving) or name != "structure"
    one, two = weights(tmp_path / "one.ckpt"), weights(joint / f"{name}.ckpt")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-9, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tokenizers: list[str]) -> Path:
    """Folder of what two sharding processes wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    two_processes("fsdp", folder, tokenizers)
    return folder


def test_shards_built_on_the_meta_device_train_as_one_process_does(
    sharded: Path, tmp_path: Path, tokenizers: list[str]
) -> None:
    """FSDP2 takes no float64, and AdamW makes steps of rounding errors: their sum against how far training went."""
    distributed_worker.run("fvar", "single", "32-true", tmp_path / "one.ckpt", tokenizers)
    one, two = weights(tmp_path / "one.ckpt"), weights(sharded / "fvar.ckpt")
    begin = distributed_worker.make_task("fvar", tokenizers).state_dict()
    assert one.keys() == two.keys()
    moved = sum((one[key] - begin[key]).square().sum() for key in begin)
    apart = sum((one[key] - two[key]).square().sum() for key in begin)
    assert moved > 0.1
    assert apart < 1e-6 * moved


def test_sharded_weights_sample_alike_in_every_process(sharded: Path) -> None:
    first, second = (torch.load(sharded / f"samples{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.std() > 0.01
    assert torch.equal(first, second)


def consolidated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the command that the configuration names makes of a sharded checkpoint."""
    file = folder.with_name(f"{folder.name}.consolidated")
    if not file.exists():
        monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint", str(folder)])
        runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
    return file


def test_a_consolidated_checkpoint_is_one_of_a_single_process(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        read_checkpoint(sharded / "shipped.ckpt")
    file = consolidated(sharded / "shipped.ckpt", monkeypatch)
    task = FVARTask.load_from_checkpoint(file)
    assert task.global_rank == 0
    student = load_fvar_checkpoint(file).var
    assert student.depth == 3
    assert torch.equal(student.head.weight, task.student.head.weight)


@pytest.mark.slow
def test_sharded_checkpoints_move_between_one_and_two_processes(
    sharded: Path, tokenizers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes wrote the first, one the second, two again the third: all hold the same."""
    environment = dict(os.environ)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    try:
        distributed_worker.ship(1, sharded / "one.ckpt", tokenizers, resume=sharded / "shipped.ckpt")
        on = distributed_worker.ship(1, sharded / "on.ckpt", tokenizers, resume=sharded / "shipped.ckpt", steps=5)
        assert on.global_step == 5
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)  # Lightning's launcher leaves its own, which would reach the next
    two_processes("resume", sharded, tokenizers)
    states = [
        torch.load(consolidated(sharded / f"{name}.ckpt", monkeypatch), weights_only=True)
        for name in ("shipped", "one", "again", "on")
    ]
    first, *others, trained = states
    for other in others:
        torch.testing.assert_close(other["state_dict"], first["state_dict"], atol=0, rtol=0)
        torch.testing.assert_close(other["optimizer_0"]["state"], first["optimizer_0"]["state"], atol=0, rtol=0)
    assert not torch.equal(trained["state_dict"]["student.head.weight"], first["state_dict"]["student.head.weight"])
