"""Runs that are killed, terminated, out of disk or out of numbers: what is left, and what a resumed run reaches."""

import errno
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

sys.path.insert(0, str(Path(__file__).parent))

import faults_worker
from evaluation_worker import LAYOUT, make_data, make_task, make_trainer, write_tokenizers
from fvar_lightning import atomic
from fvar_lightning.callbacks.checkpoint import LastCheckpoint
from fvar_lightning.callbacks.files import AtomicCheckpointIO
from fvar_lightning.cli import main
from fvar_lightning.data import datasets
from fvar_lightning.data.photographs import PhotographDataset
from fvar_lightning.data.sampler import EpochSampler, ResumableLoader
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks import stage1
from fvar_lightning.tasks.alias import AliasTokenizerTask
from fvar_lightning.tasks.finite import FiniteTask
from fvar_lightning.tasks.fvar import FVARTask

CONF = Path(__file__).parent / "conf"
STEPS = 160
INTERVAL = 3
"""Steps between two checkpoints: at the end of an epoch (4 batches), and within one."""


# Twenty kills in every stage


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults_worker"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Run:
    """One attempt at a fit, of one process or two."""

    def __init__(self, server: ForkServerContext, args: list[str], ranks: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pulse, sender = server.Pipe(duplex=False)
        self.processes: list[ForkServerProcess] = []
        for rank in range(ranks):
            own = (args, rank, port, str(log), sender)
            self.processes.append(server.Process(target=faults_worker.fit, args=own))
            self.processes[-1].start()
        sender.close()

    def wait_for(self, event: str, count: int) -> bool:
        """Whether the run came so far."""
        while count:
            try:
                count -= self.pulse.recv() == event
            except EOFError:
                return False
        return True

    def kill(self, first: list[int], pause: float) -> None:
        """SIGKILL some ranks, and after a pause, in which they may notice, the others."""
        for rank in first:
            self.processes[rank].kill()
        if len(first) < len(self.processes):
            time.sleep(pause)
        for process in self.processes:
            process.kill()
            process.join()

    def finish(self) -> list[int | None]:
        """Exit codes."""
        while self.wait_for("step", 1):
            pass
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def killed_at_random(run: Run, ranks: int, rng: random.Random) -> str:
    """Where the run was killed: while it started, trained or saved."""
    where = rng.choices(["start", "step", "save"], [1, 6, 4])[0]
    if where == "start":
        time.sleep(rng.uniform(0, 1))
    elif not run.wait_for(where, rng.randint(1, 8 if where == "step" else 2)):
        return "finished"
    else:
        time.sleep(rng.uniform(0, 0.02))
    first = rng.choice([[0], [1], [0, 1]]) if ranks == 2 else [0]
    run.kill(first, rng.uniform(0, 0.2))
    return where


def stage_args(stage: str, ranks: int, source: Path, tokenizers: list[str], tokens: Path) -> list[str]:
    config = "fvar" if stage in ("images", "cache") else stage
    args = [f"--config={CONF / config}.yaml"]
    if stage == "cache":
        args += ["--data=TokenDataModule", f"--data.path={tokens}", "--data.num_workers=0"]
    else:
        args += [f"--data.source={source}", "--data.schedule.max_radius=0.75"]
    args += [f"--data.batch_size={4 // ranks}"]
    if config == "fvar":
        args += [f"--model.structure_tokenizer={tokenizers[0]}", f"--model.alias_tokenizer={tokenizers[1]}"]
        args += ["--trainer.accumulate_grad_batches=2"]
    if ranks == 2:
        args += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    return [*args, f"--trainer.max_steps={STEPS}"]


def fit_args(args: list[str], folder: Path) -> list[str]:
    return [
        "fit", *args, f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}",
        "--trainer.callbacks=LastCheckpoint", f"--trainer.callbacks.dirpath={folder}",
        f"--trainer.callbacks.every_n_train_steps={INTERVAL}", "--trainer.callbacks+=faults_worker.Pulse",
        "--ckpt_path=last",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> tuple[list[str], Path]:
    """Tokenizers, and a cache of their tokens."""
    root = tmp_path_factory.mktemp("stage2")
    tokenizers = write_tokenizers(root)
    args = stage_args("images", 1, image_folder, tokenizers, root)
    args = [arg for arg in args if "accumulate" not in arg and "max_steps" not in arg]
    main(["predict", *args, "--data.predict=tokens", "--trainer.callbacks=TokenWriter",
          f"--trainer.callbacks.folder={root / 'tokens'}", f"--trainer.default_root_dir={root}",
          f"--trainer.logger.save_dir={root}"])  # fmt: skip
    return tokenizers, root / "tokens"


def state(path: Path) -> dict[str, Any]:
    """What a run has learned."""
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["structure", "alias", "images", "cache"])
def test_twenty_kills_change_no_weight(
    stage: str,
    ranks: int,
    server: ForkServerContext,
    image_folder: Path,
    stage2: tuple[list[str], Path],
    tmp_path: Path,
) -> None:
    """To the last bit: same machine, one thread a process, and a sum of two ranks has one order."""
    args = stage_args(stage, ranks, image_folder, *stage2)
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    assert Run(server, fit_args(args, whole), ranks, tmp_path / "whole.log").finish() == [0] * ranks
    rng, kills, half_written = random.Random(f"{stage} {ranks}"), Counter[str](), 0
    while kills.total() < 20:
        run = Run(server, fit_args(args, disturbed), ranks, tmp_path / "disturbed.log")
        kills[killed_at_random(run, ranks, rng)] += 1
        half_written += len(list(disturbed.glob("*.partial")))
        assert kills["finished"] == 0, (tmp_path / "disturbed.log.0").read_text()[-3000:]
    assert Run(server, fit_args(args, disturbed), ranks, tmp_path / "disturbed.log").finish() == [0] * ranks
    print(f"{stage}, {ranks} rank(s): {dict(kills)}, {half_written} while writing")
    torch.testing.assert_close(state(disturbed / "last.ckpt"), state(whole / "last.ckpt"), rtol=0, atol=0)
    assert [path.name for path in disturbed.glob("last*")] == ["last.ckpt"]


@pytest.mark.slow
def test_sigterm_to_any_of_two_processes_saves_on_both(
    server: ForkServerContext, image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    args = [*stage_args("images", 2, image_folder, *stage2), "--trainer.max_steps=30"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Run(server, fit_args(args, whole), 2, tmp_path / "whole.log").finish() == [0, 0]
    for rank, least in ((0, 3), (1, 6)):
        stopped = Run(server, fit_args(args, run), 2, tmp_path / "run.log")
        assert stopped.wait_for("step", 6)
        stopped.processes[rank].terminate()
        assert stopped.finish() == [143, 143], (tmp_path / f"run.log.{rank}").read_text()[-3000:]
        assert least <= state(run / "last.ckpt")["global_step"] < 30
    assert Run(server, fit_args(args, run), 2, tmp_path / "run.log").finish() == [0, 0]
    torch.testing.assert_close(state(run / "last.ckpt"), state(whole / "last.ckpt"), rtol=0, atol=0)


@pytest.mark.slow
def test_kills_lose_no_sharded_checkpoint(
    server: ForkServerContext, image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Folders into which both processes write; five kills, all while one is being written or just has been."""
    args = [arg for arg in stage_args("images", 2, image_folder, *stage2) if "strategy" not in arg]
    args += ["--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.data_parallel_size=2",
             "--trainer.strategy.tensor_parallel_size=1", "--trainer.strategy.process_group_backend=gloo",
             "--trainer.strategy.save_distributed_checkpoint=true", "--trainer.max_steps=24"]  # fmt: skip
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    assert Run(server, fit_args(args, whole), 2, tmp_path / "whole.log").finish() == [0, 0]
    rng = random.Random(0)
    for kill in range(5):
        run = Run(server, fit_args(args, disturbed), 2, tmp_path / "disturbed.log")
        assert run.wait_for("save", 1 + (kill == 0)), (tmp_path / "disturbed.log.0").read_text()[-3000:]
        time.sleep(rng.uniform(0, 0.1))
        run.kill([kill % 2], 0.1)
        assert list(disturbed.glob("last*.ckpt"))
    assert Run(server, fit_args(args, disturbed), 2, tmp_path / "disturbed.log").finish() == [0, 0]
    for folder in (whole, disturbed):
        assert sorted(path.name for path in folder.glob("last*")) == ["last.ckpt"]
        dcp_to_torch_save(folder / "last.ckpt", folder / "one.ckpt")
    one, two = (torch.load(folder / "one.ckpt", weights_only=True) for folder in (whole, disturbed))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(two["optimizer_0"]["state"], one["optimizer_0"]["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_both_processes_stop_where_one_has_a_loss_that_is_not_finite(
    server: ForkServerContext, image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    args = fit_args(stage_args("images", 2, image_folder, *stage2), tmp_path)
    args += [
        "--trainer.callbacks+=faults_worker.Poison",
        "--trainer.callbacks.rank=1",
        "--trainer.callbacks.micro_batch=11",
    ]
    assert Run(server, args, 2, tmp_path / "log").finish() == [1, 1]
    first, second = ((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    assert "rank 0: another rank found what is not finite and names it" in first
    # four batches of two an epoch: number 11 is the last of the third epoch
    data = make_data(image_folder, val_fraction=0.25)
    sampler = EpochSampler(data._data.train, shuffle=True, num_replicas=2, rank=1)
    sampler.set_epoch(2)
    names = "".join(f"\n  {data._data.train.name(draw.index)}" for draw in list(sampler)[6:8])
    assert "the loss is not finite at step 5 (epoch 2, batch 3, rank 1): student" in second
    assert f"loss nan. The samples of the batch:{names}\nThe last good checkpoint is {tmp_path / 'last.ckpt'}" in second
    assert state(tmp_path / "last.ckpt")["global_step"] == INTERVAL * (5 // INTERVAL)


# What a run in this process leaves behind


class At(Callback):
    """Does something before a micro-batch."""

    def __init__(self, micro_batch: int, action: Callable[[], object]) -> None:
        self.left, self.action = micro_batch, action

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.left == 0:
            self.action()
        self.left -= 1


def fit(
    root: Path, source: Path, tokenizers: list[str], *callbacks: Callback, interval: int = 100, **options: Any
) -> FVARTask:
    """Seven steps of stage 2, three or with accumulation two an epoch; from last.ckpt where there is one."""
    task = make_task(tokenizers)
    last = LastCheckpoint(str(root), interval)
    trainer = make_trainer(root, [last, *callbacks], enable_checkpointing=True,
                           **({"max_epochs": -1, "max_steps": 7} | options))  # fmt: skip
    path = root / "last.ckpt"
    trainer.fit(task, make_data(source, batch_size=5, val_fraction=0.25), ckpt_path=path if path.exists() else None)
    return task


def same(one: FVARTask, two: FVARTask) -> None:
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def killed() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sigterm_saves_at_the_end_of_the_step(
    accumulate: int, image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    tokenizers, _ = stage2
    options = {"accumulate_grad_batches": accumulate}
    whole = fit(tmp_path / "whole", image_folder, tokenizers, **options)
    before = signal.getsignal(signal.SIGTERM)
    terminate = At(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "run", image_folder, tokenizers, terminate, **options)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    # micro-batches 0 1 | 2 || 3 4 | 5 || ...: an epoch ends where there is nothing left to accumulate
    step = {1: 4, 2: 3}[accumulate]
    assert state(tmp_path / "run" / "last.ckpt")["global_step"] == step
    # killed between the micro-batches of a step that follows a multiple of the interval
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "run", image_folder, tokenizers, At(1, killed), interval=step, **options)
    assert state(tmp_path / "run" / "last.ckpt")["global_step"] == step
    same(fit(tmp_path / "run", image_folder, tokenizers, **options), whole)


def test_a_full_disk_leaves_the_checkpoint_before(
    image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    tokenizers, _ = stage2
    whole = fit(tmp_path / "whole", image_folder, tokenizers)
    last = tmp_path / "run" / "last.ckpt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size // 2, limits[1]))

    try:
        with pytest.raises(OSError, match=rf"checkpoint '{last}' could not be written: File too large; the one") as e:
            fit(last.parent, image_folder, tokenizers, At(4, fill), interval=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert e.value.errno == errno.EFBIG
    assert [path.name for path in last.parent.glob("last*")] == ["last.ckpt"]
    assert state(last)["global_step"] == 4
    same(fit(last.parent, image_folder, tokenizers), whole)


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "last.ckpt"
    with pytest.raises(OSError, match=f"checkpoint '{path}' could not be written: [^;]*$"):
        AtomicCheckpointIO().save_checkpoint({}, path)
    with pytest.raises(RuntimeError, match="not of the disk"):
        AtomicCheckpointIO().save_checkpoint({"x": Unwritable()}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Unwritable:
    def __reduce__(self) -> tuple[Any, ...]:
        raise RuntimeError("not of the disk")


def test_half_written_files_are_no_checkpoints_and_go(
    image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    tokenizers, _ = stage2
    fit(tmp_path, image_folder, tokenizers, max_steps=2)
    for name in ("last.ckpt.17.partial", "last-v1.ckpt.4.partial", "other.ckpt.17.partial"):
        (tmp_path / name).write_bytes((tmp_path / "last.ckpt").read_bytes()[:1000])
    trainer = make_trainer(tmp_path, [LastCheckpoint(str(tmp_path))], max_steps=3, max_epochs=-1,
                           enable_checkpointing=True)  # fmt: skip
    trainer.fit(make_task(tokenizers), make_data(image_folder, batch_size=5, val_fraction=0.25), ckpt_path="last")
    assert state(tmp_path / "last.ckpt")["global_step"] == 3
    assert {path.name for path in tmp_path.glob("*.ckpt*")} == {"last.ckpt", "other.ckpt.17.partial"}


def test_a_folder_is_replaced_by_another_whenever_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each of its renames and removals: one of the two is whole, and is found as the last checkpoint."""

    def write(path: Path, content: str) -> None:
        path.mkdir()
        for name in "abc":
            (path / name).write_text(content)

    def contents() -> set[str]:
        found = [path for path in tmp_path.iterdir() if path.suffix == ".ckpt" and path.stem.startswith("last")]
        return {"".join(sorted((path / name).read_text() for name in "abc")) for path in found}

    left = [100]

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                if function is rmtree:
                    (args[0] / "a").unlink()
                killed()
            function(*args, **options)

        return call

    rmtree = shutil.rmtree
    for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    path = tmp_path / "last.ckpt"
    write(path, "0")
    for generation in range(1, 40):
        write(tmp_path / "last.ckpt.1.partial", str(generation % 10))
        left[0] = generation % 7 if generation % 2 else 100
        try:
            atomic.replace_folder(tmp_path / "last.ckpt.1.partial", path)
        except RuntimeError:
            left[0] = 100
            atomic.remove_partial(tmp_path, "last*.ckpt")
        else:
            assert contents() == {3 * str(generation % 10)}
        assert contents()
        assert contents() <= {3 * str(g % 10) for g in (generation - 2, generation - 1, generation)}
    assert sorted(path.name for path in tmp_path.iterdir()) in (["last.ckpt"], ["last-before.ckpt"])


def test_the_same_command_begins_a_run_and_continues_it(image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lightning_logs" / "mine" / "checkpoints" / "last.ckpt"
    for steps, resumed in ((2, None), (4, str(path))):
        cli = main(["fit", f"--config={CONF / 'alias.yaml'}", f"--data.source={image_folder}",
                    f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}",
                    "--trainer.logger.version=mine", "--trainer.callbacks=LastCheckpoint", "--ckpt_path=last",
                    f"--trainer.max_steps={steps}"])  # fmt: skip
        assert cli.trainer.ckpt_path == resumed
        assert state(path)["global_step"] == steps


def test_the_checkpoint_of_another_run_stays(
    image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    """A run that begins anew in the folder writes beside it, and one that goes on from a copy elsewhere; one that goes
    on from it replaces it."""
    tokenizers, _ = stage2
    (tmp_path / "copies").mkdir()
    for steps, resumed, names in (
        (2, None, {"last"}),
        (3, None, {"last", "last-v1"}),
        (4, "last", {"last", "last-v1"}),
        (5, "copies/last", {"last", "last-v1", "last-v2"}),
    ):
        path = None if resumed is None else tmp_path / f"{resumed}.ckpt"
        if resumed == "copies/last":
            shutil.copy(tmp_path / "last.ckpt", path)
        callback = LastCheckpoint(str(tmp_path), 100 + steps)
        trainer = make_trainer(tmp_path, [callback], max_steps=steps, max_epochs=-1, enable_checkpointing=True)
        trainer.fit(make_task(tokenizers), make_data(image_folder, batch_size=5, val_fraction=0.25), ckpt_path=path)
        assert {path.stem for path in tmp_path.glob("*.ckpt")} == names
    assert state(tmp_path / "last.ckpt")["global_step"] == 4
    assert state(tmp_path / "last-v1.ckpt")["global_step"] == 3
    assert state(tmp_path / "last-v2.ckpt")["global_step"] == 5
    with pytest.raises(ValueError, match="every_n_train_steps must be positive, got 0"):
        LastCheckpoint(every_n_train_steps=0)


# Losses that are not finite


def poison(monkeypatch: pytest.MonkeyPatch, micro_batch: int, term: str = "student", value: float = math.nan) -> None:
    """From one micro-batch on a term of stage 2 is not finite."""
    calls = itertools.count()
    losses = FVARTask.losses

    def poisoned(task: FVARTask, *args: Any) -> dict[str, torch.Tensor]:
        terms = losses(task, *args)
        if next(calls) >= micro_batch:
            terms |= {name: terms[name] * value for name in (term, "loss")}
        return terms

    monkeypatch.setattr(FVARTask, "losses", poisoned)


@pytest.mark.parametrize(("accumulate", "resumed"), [(1, False), (2, False), (1, True)])
def test_a_loss_that_is_not_finite_names_the_files(
    accumulate: int,
    resumed: bool,
    image_folder: Path,
    stage2: tuple[list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizers, _ = stage2
    options = {"accumulate_grad_batches": accumulate, "interval": 2, "limit_val_batches": 0}
    if resumed:
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path, image_folder, tokenizers, At(3, killed), **options)
    read: list[str] = []
    load = datasets.load_image
    monkeypatch.setattr(datasets, "load_image", lambda path: read.append(path) or load(path))
    poison(monkeypatch, 2 if resumed else 4)
    with pytest.raises(FloatingPointError) as error:
        fit(tmp_path, image_folder, tokenizers, **options)
    # batches of 5, three an epoch: number 4 is the second of the second epoch
    batch = read[10:15] if resumed else read[20:25]
    lines = str(error.value).splitlines()
    step = {1: 4, 2: 2}[accumulate]
    assert lines[0].startswith(
        f"the loss is not finite at step {step} (epoch 1, batch 1, rank 0): student nan, teacher "
    )
    assert lines[0].endswith("loss nan. The samples of the batch:")
    assert [line.strip() for line in lines[1:-1]] == batch
    assert lines[-1] == f"The last good checkpoint is {tmp_path / 'last.ckpt'}"
    saved = state(tmp_path / "last.ckpt")
    assert saved["global_step"] == step
    assert all(torch.isfinite(x).all() for x in saved["state_dict"].values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_checkpoint_is_written_of_what_was_not_looked_at(
    value: float, image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nothing waits for the terms between two log entries."""
    tokenizers, tokens = stage2
    monkeypatch.setattr(FVARTask, "on_train_batch_end", lambda *args: None)
    poison(monkeypatch, 3, "feature", value)
    data = TokenDataModule(str(tokens), batch_size=4, num_workers=0)
    trainer = make_trainer(tmp_path, [LastCheckpoint(str(tmp_path), 2)], max_steps=9, enable_checkpointing=True)
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(make_task(tokenizers), data)
    sampler = data.train_dataloader().sampler
    lines = str(error.value).splitlines()
    assert re.match(
        rf"the loss is not finite at step 3 \(epoch 0, batch 3, rank 0\): .* feature {value}, loss", lines[0]
    )
    assert lines[1:-1] == [f"  row {draw.index} of {tokens}" for draw in list(sampler)[12:16]]
    assert state(tmp_path / "last.ckpt")["global_step"] == 2


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(
    image_folder: Path, stage2: tuple[list[str], Path], tmp_path: Path
) -> None:
    """A step that is too large, after losses that were finite."""
    task = make_task(stage2[0])
    task.optimizer_factory = lambda params: torch.optim.SGD(params, lr=math.inf)
    trainer = make_trainer(tmp_path, [LastCheckpoint(str(tmp_path), 1)], max_steps=9, enable_checkpointing=True)
    message = (
        r"(?s)weights are not finite after step 1 \(rank 0\), with losses that are: student.*No checkpoint has been"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(task, make_data(image_folder))
    assert not list(tmp_path.glob("*.ckpt*"))


def test_neither_averages_nor_what_lies_beside_them_may_be_not_finite(
    stage2: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = make_task(stage2[0])
    monkeypatch.setattr(task, "_trainer", make_trainer(tmp_path, []))
    good, bad = {"weight": torch.zeros(1)}, {"weight": torch.tensor([math.nan])}
    for averages, last in ((good, bad), (bad, good)):
        with pytest.raises(FloatingPointError, match="1 weights are not finite after step 0"):
            FiniteTask.on_save_checkpoint(task, {"state_dict": averages, "current_model_state": last})
    FiniteTask.on_save_checkpoint(task, {"state_dict": good, "current_model_state": good})


def test_stage_one_stops_too(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1, "pixel_loss", lambda x, y, *weights: (x - y).mean() / 0)
    schedule = FocusSchedule(**LAYOUT)
    task = AliasTokenizerTask(schedule, vocab_size=8, z_channels=4, ch=8)
    trainer = make_trainer(tmp_path, [])
    with pytest.raises(FloatingPointError, match=r"at step 0 .*: loss (nan|-?inf), pixel (nan|-?inf), vq 0\.") as error:
        trainer.fit(task, make_data(image_folder))
    assert len(re.findall(rf"\n  {image_folder}/(blue|red)/\d\.png", str(error.value))) == 2


def test_data_without_names() -> None:
    loader = ResumableLoader(list(range(4)), batch_size=2, sampler=EpochSampler(range(4), shuffle=True))
    assert loader.names(0, 0) == []
    assert PhotographDataset(16, 4).name(11) == "hubble_deep_field, crop 1"
