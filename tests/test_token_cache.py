"""Token caches: what is read is what was written, of any size, with few files open; what is refused and how."""

import dataclasses
import errno
import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fvar_lightning.data import token_dataset
from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.data.token_cache import ShardLayout, TokenCache, remove_tokens
from fvar_lightning.data.token_dataset import TokenDataset
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.data.tokens import TokenizerIdentity, TokenMeta, disagreements
from fvar_lightning.schedule import FocusSchedule
from token_caches import META, WITHOUT_ALIAS, random_tokens, write_cache

LAYOUTS = [{}, {"rows_per_shard": 3}, {"rows_per_shard": 2, "ranks": 2}, {"rows_per_shard": 1, "ranks": 5}]


@contextmanager
def file_limit(files: int) -> Iterator[None]:
    """At most so many open files meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd"))


@pytest.mark.parametrize("rows", [1, 5, 7, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_rows_lie_where_dealing_them_out_puts_them(rows: int, ranks: int, size: int) -> None:
    layout = ShardLayout(rows, ranks, size)
    dealt = [list(range(rank, rows, ranks)) for rank in range(ranks)]
    expected = {}
    for rank, mine in enumerate(dealt):
        for block, start in enumerate(range(0, len(mine), size)):
            expected[block * ranks + rank] = mine[start : start + size]
    assert sorted(expected) == list(range(layout.num_shards))
    assert [layout.length(shard) for shard in sorted(expected)] == [len(expected[s]) for s in sorted(expected)]
    for shard, mine in expected.items():
        assert [layout.find(row) for row in mine] == [(shard, place) for place in range(len(mine))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_gives_back_what_was_written(tmp_path: Path, layout: dict[str, int]) -> None:
    structure, alias, labels = write_cache(tmp_path, **layout)
    assert structure.max() > 2**15, "needs all sixteen bits"
    data = TokenDataset(tmp_path)
    assert len(data) == 7
    assert data.meta == META
    batch = data.collate([data[i] for i in range(7)])
    assert isinstance(batch, TokenBatch)
    assert [tuple(part.shape) for part in batch.structure] == [(7, 1), (7, 4)]
    assert torch.equal(torch.cat(batch.structure, 1), structure)
    assert torch.equal(torch.cat(batch.alias, 1), alias)
    assert torch.equal(batch.labels, labels)
    assert batch.labels.dtype == batch.structure[0].dtype == torch.int64
    for row in (-1, 7):
        with pytest.raises(IndexError):
            data[row]


def test_a_shard_is_an_array_that_numpy_reads(tmp_path: Path) -> None:
    structure, alias, labels = write_cache(tmp_path)
    rows = np.load(tmp_path / "shard-000000.npy")
    np.testing.assert_array_equal(rows["structure"], structure.numpy())
    np.testing.assert_array_equal(rows["alias"], alias.numpy())
    np.testing.assert_array_equal(rows["label"], labels.numpy())
    assert (rows["structure"].dtype, rows["label"].dtype) == (np.uint16, np.int64)


def test_cache_without_alias_tokens(tmp_path: Path) -> None:
    structure, _, _ = write_cache(tmp_path, meta=WITHOUT_ALIAS)
    data = TokenDataset(tmp_path)
    batch = data.collate([data[0], data[1]])
    assert batch.alias == []
    assert torch.equal(torch.cat(batch.structure, 1), structure[:2])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_token_data_module(tmp_path: Path, num_workers: int) -> None:
    structure, _, _ = write_cache(tmp_path / "train", rows_per_shard=2)
    write_cache(tmp_path / "val", rows=5)
    data = TokenDataModule(str(tmp_path / "train"), str(tmp_path / "val"), batch_size=2, num_workers=num_workers)
    assert data.num_classes == 2
    assert data.class_names == ["cat", "dog"]
    _ = data.train[0]  # files that are open before workers start
    batches = list(data.train_dataloader())
    assert [len(batch.labels) for batch in batches] == [2, 2, 2]
    rows = {tuple(row) for batch in batches for row in torch.cat(batch.structure, 1).tolist()}
    assert len(rows) == 6
    assert rows <= {tuple(row) for row in structure.tolist()}
    assert sum(len(batch.labels) for batch in data.val_dataloader()) == 5
    assert len(list(data.predict_dataloader())) == 8
    assert TokenDataModule(str(tmp_path / "train")).val_dataloader() == []


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, _, _ = write_cache(tmp_path, rows=40, rows_per_shard=2)
    monkeypatch.setattr(token_dataset, "MAX_OPEN", 3)
    before = open_files()
    data = TokenDataset(tmp_path)
    assert open_files() == before, "opened when asked for"
    for _ in range(2):
        for row in np.random.default_rng(0).permutation(40).tolist():
            assert torch.equal(data[row][0], structure[row])
            assert open_files() <= before + 3
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[39][0], structure[39])
    assert len(pickle.dumps(data)) < 3000, "a worker is sent no files and no rows"
    del data, again
    assert open_files() == before


def test_two_million_rows_with_256_files(tmp_path: Path) -> None:
    """489 shards; rows are numbered, so that each is known."""
    meta = dataclasses.replace(WITHOUT_ALIAS, schedule=FocusSchedule((1,), 4, focus_states=1))
    cache = TokenCache(tmp_path, meta, ShardLayout(2_000_000, ranks=3, rows_per_shard=4096))
    cache.claim()
    for shard in range(cache.layout.num_shards):
        rows = np.zeros(cache.layout.length(shard), meta.dtype)
        block, rank = divmod(shard, 3)
        rows["label"] = (block * 4096 + np.arange(len(rows))) * 3 + rank
        rows["structure"] = rows["label"][:, None] % 60000
        cache.write(shard, rows)
    with file_limit(256):
        data = TokenDataset(tmp_path)
        assert len(data) == 2_000_000
        wanted = [0, 1_999_999, *np.random.default_rng(0).integers(2_000_000, size=3000).tolist()]
        for row in wanted:
            structure, _, label = data[row]
            assert (structure.tolist(), label) == ([row % 60000], row)
        loader = torch.utils.data.DataLoader(data, 500, sampler=wanted[:1000], collate_fn=data.collate, num_workers=1)
        assert torch.cat([batch.labels for batch in loader]).tolist() == wanted[:1000]


def test_memory_does_not_grow_with_the_rows_read(tmp_path: Path) -> None:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("needs /proc")
    cache = TokenCache(tmp_path, META, ShardLayout(4_000_000))
    cache.claim()
    for shard in range(cache.layout.num_shards):  # 112 MB of nothing, which takes no place on disk
        rows = cache.layout.length(shard)
        with cache.path(shard).open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": META.dtype.descr, "fortran_order": False, "shape": (rows,)}
            )
            file.truncate(file.tell() + rows * META.dtype.itemsize)
    data = TokenDataset(tmp_path)
    _ = data[0]

    def resident() -> int:
        return int(statm.read_text().split()[1]) * resource.getpagesize()

    before = resident()
    for row in range(0, 4_000_000, 100):  # one of every page
        _ = data[row]
    assert resident() - before < 16e6


def test_a_shortage_of_files_is_told_as_that(tmp_path: Path) -> None:
    write_cache(tmp_path)
    data = TokenDataset(tmp_path)
    with file_limit(0):
        for attempt in (lambda: data[0], lambda: TokenDataset(tmp_path), data.cache.missing):
            with pytest.raises(OSError, match="Too many open files") as caught:
                attempt()
            assert caught.value.errno == errno.EMFILE
    assert data[0][0].shape == (5,)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "shard-000001.npy").unlink(), "1 of 3 shards are missing, e.g. .*000001"),
        (lambda folder: (folder / "shard-000001.npy").write_bytes(b"\x93NUMPY"), "000001.npy.* write it again"),
        (lambda folder: os.truncate(folder / "shard-000001.npy", 200), "is broken: .*000001.npy.*; write it again"),
        (lambda folder: (folder / "shard-000001.npy").write_bytes((folder / "shard-000002.npy").read_bytes()),
         r"000001.npy holds rows \(1,\) .* tells of rows \(3,\)"),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json cannot be used .*write the cache again"),
        (lambda folder: (folder / "index.json").write_text('{"format": 2}'), "index.json cannot be used: KeyError"),
        (lambda folder: (folder / "index.json").write_text(json.dumps({"format": 1, "patch_nums": [1, 2]})),
         "index.json is of format 1, not 2 as this version reads; write the cache again"),
        (lambda folder: (folder / "index.json").unlink(), "holds no index.json: no token cache"),
    ],
)  # fmt: skip
def test_caches_that_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    write_cache(tmp_path, rows_per_shard=3)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenDataModule(str(tmp_path))


def test_a_shard_that_is_cut_later_is_told(tmp_path: Path) -> None:
    write_cache(tmp_path)
    data = TokenDataset(tmp_path)
    os.truncate(tmp_path / "shard-000000.npy", 200)
    with pytest.raises(ValueError, match=r"shard-000000.npy ends early; write it again"):
        data[6]


def test_two_caches_must_be_of_the_same_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*nowhere' is not a folder"):
        TokenDataModule(str(tmp_path / "nowhere"))
    write_cache(tmp_path / "train")
    gaussian = dataclasses.replace(META, structure=dataclasses.replace(META.structure, psf="gaussian"))
    write_cache(tmp_path / "val", meta=gaussian)
    with pytest.raises(ValueError, match=r"val_path .* does not match .* structure.psf 'gaussian' instead of 'disk'"):
        TokenDataModule(str(tmp_path / "train"), str(tmp_path / "val"))


def test_deviations_measured_in_other_batches_are_the_same_tokens(tmp_path: Path) -> None:
    """Also where a cache is gone on with; others are not."""
    metas = {
        name: dataclasses.replace(META, alias_deviations=[0.058139286 * factor] * len(META.lengths))
        for name, factor in (("train", 1.0), ("val", 1 + 1e-7), ("other", 1.1))
    }
    for name, meta in metas.items():
        write_cache(tmp_path / name, meta=meta)
    TokenDataModule(str(tmp_path / "train"), str(tmp_path / "val"))
    cache = TokenCache.open(tmp_path / "train")
    dataclasses.replace(cache, tokens=metas["val"]).claim()
    with pytest.raises(ValueError, match=r"val_path .* does not match .* alias_deviations"):
        TokenDataModule(str(tmp_path / "train"), str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"holds a token cache of tokens\.alias_deviations"):
        dataclasses.replace(cache, tokens=metas["other"]).claim()


def test_tokens_that_are_refused() -> None:
    structure, alias, labels = random_tokens(2)

    def rows(structure: torch.Tensor, alias: torch.Tensor) -> np.ndarray:
        return META.rows(TokenBatch([structure], [alias], labels))

    with pytest.raises(ValueError, match=r"structure must lie in 0\.\.65535, got .*\.\.65536"):
        rows(structure.index_fill(1, torch.tensor(1), 65536), alias)
    with pytest.raises(ValueError, match=r"alias must lie in 0..65535, got -"):
        rows(structure, alias - 9)
    with pytest.raises(ValueError, match=r"alias must measure \(2, 5\), got \(1, 5\)"):
        rows(structure, alias[:1])
    with pytest.raises(ValueError, match="alias tokens are missing"):
        META.rows(TokenBatch([structure], [], labels))
    with pytest.raises(ValueError, match=r"vocab_size must lie in 1..65536, got 70000"):
        TokenizerIdentity(70000, "", None)
    with pytest.raises(ValueError, match="rows must be positive, got 0"):
        ShardLayout(0)


def test_failed_write_leaves_the_old_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, _, _ = write_cache(tmp_path)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            TokenCache.open(tmp_path).write(0, np.zeros(7, META.dtype))
    assert torch.equal(TokenDataset(tmp_path)[0][0], structure[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-000000.npy"]


def test_a_claim_goes_on_or_refuses(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, META, ShardLayout(7, rows_per_shard=3), {"part": "train"}, {"batch_size": 3})
    cache.claim()
    cache.write(1, np.zeros(3, META.dtype))
    (tmp_path / "shard-000002.npy.1.partial").write_bytes(b"half")
    cache.claim()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-000001.npy"]
    assert cache.missing() == [0, 2]
    assert TokenCache.open(tmp_path) == cache
    others = {
        "layout.ranks 1 instead of 2": {"layout": ShardLayout(7, 2, 3)},
        "images.part 'train' instead of 'val'": {"images": {"part": "val"}},
        "writing.batch_size 3 instead of 4": {"writing": {"batch_size": 4}},
        "tokens.structure.sha256 '5+' instead of '6+'": {
            "tokens": dataclasses.replace(META, structure=TokenizerIdentity(60000, "6" * 64, "disk", "view"))
        },
        "tokens.schedule.patch_size 4 instead of 8": {
            "tokens": dataclasses.replace(META, schedule=FocusSchedule((1, 2), 8, focus_states=2))
        },
    }
    for message, change in others.items():
        other = dataclasses.replace(cache, **change)
        with pytest.raises(ValueError, match=f"holds a token cache of {message}: give another folder, or remove it"):
            other.claim()
        assert TokenCache.open(tmp_path) == cache
    other.claim(replace=True)
    assert TokenCache.open(tmp_path) == other
    assert other.missing() == [0, 1, 2]
    cache.index.unlink()
    cache.path(0).touch()
    with pytest.raises(ValueError, match=r"holds shards of tokens, but no index.json: give another folder"):
        cache.claim()


def test_a_cache_of_an_earlier_format_can_be_replaced(tmp_path: Path) -> None:
    for name in ("structure-000000.npy", "alias-000000.npy", "labels-000000.npy", "labels-mine.npy"):
        (tmp_path / name).touch()
    (tmp_path / "index.json").write_text(json.dumps({"format": 1}))
    cache = TokenCache(tmp_path, META, ShardLayout(7))
    with pytest.raises(ValueError, match=r"format 1, .*; write the cache again: give another folder, or remove it"):
        cache.claim()
    cache.claim(replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "labels-mine.npy"]


def test_removing_a_cache_leaves_other_files(tmp_path: Path) -> None:
    write_cache(tmp_path, rows_per_shard=2)
    (tmp_path / "shard-mine.npy").touch()
    remove_tokens(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-mine.npy"]


def test_disagreements_are_named_at_any_depth() -> None:
    found: dict[str, object] = {"a": {"b": 1, "c": 2}, "d": None, "e": "x" * 99}
    assert disagreements(found, found) == ""
    assert disagreements(found, {"a": {"b": 1, "c": 3}, "d": {"f": 4}, "e": "x" * 99}) == (
        "a.c 2 instead of 3; d.f None instead of 4"
    )
    assert disagreements(found, {**found, "e": ""}) == f"e '{'x' * 66}... instead of ''"
    assert TokenMeta.of(json.loads(json.dumps(dataclasses.asdict(META)))) == META
