"""`fvar predict --data.predict=tokens`: what is in the cache, and what an interrupted run makes of it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evaluation_worker import make_data, make_task, make_trainer, write_tokenizers
from fvar_lightning.callbacks.tokens import TokenWriter
from fvar_lightning.cli import main
from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.token_cache import TokenCache
from fvar_lightning.data.token_dataset import TokenDataset
from fvar_lightning.tasks.fvar import FVARTask


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def images_of(folder: Path, **options: Any) -> ImageDataModule:
    """Three crops of each of 16 images, in batches of 4."""
    return make_data(folder, **({"predict": "tokens", "crops_per_image": 3, "batch_size": 4} | options))


def predict(task: FVARTask, data: ImageDataModule, folder: Path, **options: Any) -> object:
    writer = TokenWriter(str(folder), **({"rows_per_shard": 6} | options))
    return make_trainer(folder.parent, [writer], logger=False).predict(task, data)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tokenizers: list[str], image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "tokens"
    assert predict(make_task(tokenizers), images_of(image_folder), folder) is None, "predictions are not collected"
    return folder


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that is encoded from now on."""
    counts: list[int] = []
    tokens = FVARTask.tokens

    def counting(task: FVARTask, batch: ImageBatch) -> TokenBatch:
        counts.append(len(batch.labels))
        return tokens(task, batch)

    monkeypatch.setattr(FVARTask, "tokens", counting)
    return counts


def test_the_cache_holds_the_tasks_own_tokens(whole: Path, tokenizers: list[str], image_folder: Path) -> None:
    task, data = make_task(tokenizers), images_of(image_folder)
    batches = [task.tokens(data.on_after_batch_transfer(batch, 0)) for batch in data.predict_dataloader()]
    cached = TokenDataset(whole)
    assert len(cached) == 48
    rows = cached.collate([cached[i] for i in range(48)])
    assert torch.equal(rows.labels, torch.cat([batch.labels for batch in batches]))
    for part in ("structure", "alias"):
        for scale in range(3):
            made = torch.cat([getattr(batch, part)[scale] for batch in batches])
            assert torch.equal(getattr(rows, part)[scale], made)
    assert sorted(contents(whole)) == ["index.json", *(f"shard-{i:06d}.npy" for i in range(6))], "6 rows become 8"


def test_the_index_tells_what_the_tokens_depend_on(whole: Path, tokenizers: list[str], image_folder: Path) -> None:
    cache, task = TokenCache.open(whole), make_task(tokenizers)
    assert cache.tokens == task.token_meta()
    assert cache.tokens.schedule == task.vae.schedule
    assert (cache.tokens.structure.psf, cache.tokens.structure.targets) == ("disk", "view")
    assert cache.tokens.structure.sha256 != cache.tokens.alias.sha256
    assert cache.images == images_of(image_folder).cached_images()
    assert set(cache.images) == {"part", "crops_per_image", "seed", "fingerprint"}
    assert cache.writing == {"batch_size": 4, "precision": "32-true"}


def test_validation_images_make_a_cache_too(
    whole: Path, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    predict(make_task(tokenizers), images_of(image_folder, part="val"), tmp_path / "val")
    cached = TokenDataset(tmp_path / "val")
    assert [cached[i][2] for i in range(len(cached))] == [0, 0, 1, 1]
    assert cached.meta == TokenDataset(whole).meta
    with pytest.raises(ValueError, match=r"holds a token cache of .*images.part 'val' instead of 'train'"):
        predict(make_task(tokenizers), images_of(image_folder), tmp_path / "val")


@pytest.mark.parametrize("written", [0, 1, 4])
def test_an_interrupted_run_encodes_what_is_missing(
    written: int,
    whole: Path,
    tokenizers: list[str],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = TokenCache.write

    def failing(cache: TokenCache, shard: int, rows: np.ndarray) -> None:
        if shard == written:
            raise OSError("disk gone")
        write(cache, shard, rows)

    folder = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr(TokenCache, "write", failing)
        with pytest.raises(OSError, match="disk gone"):
            predict(make_task(tokenizers), images_of(image_folder), folder)
    with pytest.raises(ValueError, match=rf"incomplete: {6 - written} of 6 shards are missing"):
        TokenDataset(folder)
    # what a kill leaves of the file that was being written
    (folder / "shard-000004.npy.1.partial").write_bytes(b"half")

    counts = encoded(monkeypatch)
    predict(make_task(tokenizers), images_of(image_folder), folder)
    assert sum(counts) == 48 - 8 * written
    assert contents(folder) == contents(whole)
    counts.clear()
    predict(make_task(tokenizers), images_of(image_folder), folder)
    assert counts == []
    # a crash of the machine may tear a file that was renamed
    (folder / "shard-000005.npy").write_bytes(contents(whole)["shard-000005.npy"][:-1])
    predict(make_task(tokenizers), images_of(image_folder), folder)
    assert sum(counts) == 8
    assert contents(folder) == contents(whole)


def test_a_short_run_says_what_is_missing(
    tokenizers: list[str], image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TokenWriter(str(tmp_path / "tokens"), rows_per_shard=6)
    trainer = make_trainer(tmp_path, [writer], logger=False, limit_predict_batches=3)
    with caplog.at_level("INFO"):
        trainer.predict(make_task(tokenizers), images_of(image_folder))
    assert "5 of 6 shards are missing" in caplog.text


@pytest.mark.parametrize(
    ("data", "writer", "message"),
    [
        ({"seed": 1}, {}, "images.seed 0 instead of 1"),
        ({"crops_per_image": 4}, {}, "layout.rows 48 instead of 64; images.crops_per_image 3 instead of 4"),
        ({"batch_size": 3}, {}, "writing.batch_size 4 instead of 3"),
        ({"resize": "adm"}, {}, "images.fingerprint '[0-9a-f]+' instead of '[0-9a-f]+'"),
        ({}, {"rows_per_shard": 9}, "layout.rows_per_shard 8 instead of 12"),
    ],
)
def test_a_folder_of_another_cache_is_refused(
    data: dict[str, object],
    writer: dict[str, Any],
    message: str,
    whole: Path,
    tokenizers: list[str],
    image_folder: Path,
) -> None:
    before = contents(whole)
    with pytest.raises(ValueError, match=f"holds a token cache of .*{message}.*: give another folder, or remove it"):
        predict(make_task(tokenizers), images_of(image_folder, **data), whole, **writer)
    assert contents(whole) == before


def other_tokenizers(paths: list[str], root: Path, **description: object) -> list[str]:
    """Tokenizers of the same sizes: other weights, or another description."""
    made = []
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        if description:
            checkpoint["tokenizer"] |= description
        else:
            name = next(n for n in checkpoint["state_dict"] if n.endswith("codebook.embedding.weight"))
            checkpoint["state_dict"][name] = checkpoint["state_dict"][name].flip(0)
        made.append(str(root / Path(path).name))
        torch.save(checkpoint, made[-1])
    return made


def test_another_tokenizer_of_equal_size_is_refused_or_replaces(
    whole: Path, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    others = other_tokenizers(tokenizers, tmp_path)
    with pytest.raises(ValueError, match=r"tokens.structure.sha256 '\w+' instead of '\w+'; tokens.alias.sha256"):
        predict(make_task(others), images_of(image_folder), whole)
    folder = tmp_path / "tokens"
    predict(make_task(tokenizers), images_of(image_folder), folder)
    predict(make_task(others), images_of(image_folder), folder, replace=True)
    assert TokenDataset(folder).meta == make_task(others).token_meta() != TokenDataset(whole).meta


class Ranks:
    """Three ranks, one after the other: loaders, the task's tokens and the writer, without a process group."""

    def __init__(self, task: FVARTask, images: Path, folder: Path) -> None:
        self.task, self.images, self.folder = task, images, folder

    def run(self, batches: Callable[[int], int]) -> list[int]:
        """Let every rank work on so many batches; rows that each encoded. They begin together, as real ones do."""
        begun = []
        for rank in range(3):
            data = images_of(self.images, batch_size=2)
            writer = TokenWriter(str(self.folder), rows_per_shard=4)
            trainer: Any = SimpleNamespace(
                world_size=3, global_rank=rank, num_devices=3, is_global_zero=True, precision="32-true",
                datamodule=data, predict_loop=SimpleNamespace(),
                strategy=SimpleNamespace(
                    broadcast=lambda x: x, barrier=lambda: None, root_device=torch.device("cpu")
                ),
            )  # fmt: skip
            data.trainer = trainer
            writer.setup(trainer, self.task, "predict")
            begun.append((trainer, writer, data, data.predict_dataloader()))
        counts = []
        for rank, (trainer, writer, data, loader) in enumerate(begun):
            counts.append(0)
            for i, batch in zip(range(batches(rank)), loader, strict=False):
                tokens = self.task.tokens(data.on_after_batch_transfer(batch, 0))
                writer.write_on_batch_end(trainer, self.task, tokens, None, batch, i, 0)
                counts[rank] += len(tokens.labels)
        return counts


def test_ranks_resume_where_the_slowest_stopped(
    whole: Path, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """16 rows a rank, in 4 shards of 4 rows of 2 batches."""
    task = make_task(tokenizers)
    undisturbed = Ranks(task, image_folder, tmp_path / "undisturbed")
    assert undisturbed.run(lambda rank: 99) == [16, 16, 16]
    assert undisturbed.run(lambda rank: 99) == [0, 0, 0]

    ranks = Ranks(task, image_folder, tmp_path / "killed")
    assert ranks.run(lambda rank: (8, 5, 3)[rank]) == [16, 10, 6]
    assert len(list((tmp_path / "killed").glob("*.npy"))) == 4 + 2 + 1
    assert ranks.run(lambda rank: 99) == [12, 12, 12]
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")

    one, three = TokenDataset(whole), TokenDataset(tmp_path / "killed")
    rows = [data.collate([data[i] for i in range(48)]) for data in (one, three)]
    assert torch.equal(rows[0].labels, rows[1].labels)
    # in the order of the images, whoever wrote them; batches of other images may round another way
    same = torch.cat(rows[0].structure, 1) == torch.cat(rows[1].structure, 1)
    assert same.double().mean() > 0.99


@pytest.mark.parametrize("predicted", ["samples", None])
def test_a_writer_needs_tokens(
    predicted: str | None, tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    data = None if predicted is None else make_data(image_folder, predict=predicted)
    message = "needs a FVARTask and an ImageDataModule" if data is None else "predict .* must be 'tokens' .* 'samples'"
    trainer = make_trainer(tmp_path, [TokenWriter(str(tmp_path / "tokens"))], logger=False)
    with pytest.raises(ValueError, match=message):
        trainer.predict(make_task(tokenizers), data or [torch.zeros(1)])
    with pytest.raises(ValueError, match="rows_per_shard must be positive, got 0"):
        TokenWriter("tokens", rows_per_shard=0)


@pytest.mark.slow
def test_killed_processes_started_again_give_the_cache_of_an_undisturbed_one(
    tokenizers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL, five times, at random moments of the writing."""

    def arguments(folder: str) -> list[str]:
        return [
            "predict", f"--config={Path(__file__).parent / 'conf' / 'fvar.yaml'}", f"--data.source={image_folder}",
            *(f"--model.{k}_tokenizer={p}" for k, p in zip(("structure", "alias"), tokenizers, strict=True)),
            "--data.schedule.max_radius=0.75", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}",
            "--data.predict=tokens", "--data.crops_per_image=200", "--trainer.callbacks=TokenWriter",
            f"--trainer.callbacks.folder={tmp_path / folder}", "--trainer.callbacks.rows_per_shard=40",
        ]  # fmt: skip

    main(arguments("undisturbed"))
    shards = TokenCache.open(tmp_path / "undisturbed").layout.num_shards
    killed = tmp_path / "killed"
    moments = random.Random(0)
    for attempt in range(5):
        command = [sys.executable, "-m", "fvar_lightning", *arguments("killed")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            while len(list(killed.glob("*.npy"))) <= attempt * shards // 6:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert TokenCache.open(killed).missing()
    main(arguments("killed"))
    assert contents(killed) == contents(tmp_path / "undisturbed")
