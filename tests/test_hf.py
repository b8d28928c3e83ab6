"""Data sets of Hugging Face, made here in every way people keep them: columns, splits, streams, broken images."""

import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from fvar_lightning.cli import main
from fvar_lightning.data.fingerprint import fingerprint
from fvar_lightning.data.hf import HFDataset, HFOptions, load_encoded
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.sampler import StreamDraw, StreamSampler
from fvar_lightning.schedule import FocusSchedule

datasets = pytest.importorskip("datasets")
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library's own cache, in the folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def encoded(number: int) -> bytes:
    """A picture of one colour that tells its number, without loss."""
    file = io.BytesIO()
    Image.new("RGB", (18, 18), (number % 250, number // 250, 7)).save(file, "png")
    return file.getvalue()


def table(count: int, first: int = 0, labels: Any = None, **columns: Any) -> Any:
    """Pictures `first`, `first` + 1, ... of the three classes in turn."""
    features = {"image": datasets.Image(), "label": labels or datasets.ClassLabel(names=NAMES)}
    rows = {
        "image": [{"bytes": encoded(first + i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    for name, values in columns.items():
        rows[name] = values
        features.pop(name, None)
    made = datasets.Dataset.from_dict(rows)
    return made.cast(datasets.Features({**made.features, **features}))


def on_disk(root: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return f"hf:{root}"


def parquet(root: Path, shards: int = 1, **splits: Any) -> str:
    root.mkdir()
    for name, rows in splits.items():
        for i in range(shards):
            part = rows.shard(shards, i, contiguous=True)
            part.to_parquet(str(root / f"{name}-{i:05d}-of-{shards:05d}.parquet"))
    return f"hf:{root}"


def module(source: str, hf: HFOptions = HFOptions(), **options: Any) -> ImageDataModule:  # noqa: B008  (frozen)
    schedule = FocusSchedule((1, 2, 4), patch_size=4, focus_states=3)
    given = {"image_size": 16, "batch_size": 4, "num_workers": 0, "random_crop": False, "val_fraction": 0.25} | options
    return ImageDataModule(source, schedule=schedule, hf=hf, **given)  # type: ignore[arg-type]


def numbers(pixels: torch.Tensor) -> list[int]:
    """Which pictures a batch holds."""
    return (pixels[:, 0, 8, 8].long() + 250 * pixels[:, 1, 8, 8].long()).tolist()


def seen(loader: Any) -> list[int]:
    return list(itertools.chain(*(numbers(pixels) for pixels, _ in loader)))


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [on_disk, parquet])
def test_splits_and_columns_are_found(tmp_path: Path, write: Callable[..., str]) -> None:
    data = module(write(tmp_path / "data", train=table(12), validation=table(6, 100), test=table(3, 200)))
    assert data.class_names == NAMES
    assert sorted(seen(data.train_dataloader())) == list(range(12))
    assert sorted(seen(data.val_dataloader())) == list(range(100, 106))
    for pixels, labels in data.train_dataloader():
        assert labels.tolist() == [number % 3 for number in numbers(pixels)]
    assert pickle.loads(pickle.dumps(data._data.train))[3][1] == 0


def test_one_file_one_split_and_test_for_validation(tmp_path: Path) -> None:
    table(8).to_parquet(str(tmp_path / "a.parquet"))
    whole = module(f"hf:{tmp_path / 'a.parquet'}", batch_size=2)
    train, val = seen(whole.train_dataloader()), seen(whole.val_dataloader())
    assert sorted(train + val) == list(range(8))
    assert len(val) == 2
    assert val == seen(module(f"hf:{tmp_path / 'a.parquet'}", seed=5).val_dataloader()), "the same in every run"

    both = on_disk(tmp_path / "b", train=table(8), test=table(3, 50))
    assert sorted(seen(module(both).val_dataloader())) == [50, 51, 52]
    held_out = module(both, HFOptions(val_split="train"), batch_size=2)
    assert sorted(seen(held_out.train_dataloader()) + seen(held_out.val_dataloader())) == list(range(8))
    swapped = module(both, HFOptions(train_split="test", val_split="train"), batch_size=3)
    assert sorted(seen(swapped.train_dataloader())) == [50, 51, 52]


def test_without_labels_there_is_one_class(tmp_path: Path) -> None:
    table(6).remove_columns("label").save_to_disk(str(tmp_path / "birds"))
    data = module(f"hf:{tmp_path / 'birds'}")
    assert data.class_names == ["birds"]
    assert all(label == 0 for _, labels in data.train_dataloader() for label in labels)


def test_labels_of_other_types_are_sorted_into_classes(tmp_path: Path) -> None:
    words = table(6).remove_columns("label").add_column("kind", ["dog", "cat", "dog", "emu", "cat", "dog"])
    words = words.add_column("year", [9, 10, 9, 9, 10, 9]).rename_column("image", "photo")
    source = on_disk(tmp_path / "words", train=words, test=words.select(range(3)))
    assert module(source).class_names == ["words"], "only ClassLabel is found without being named"
    data = module(source, HFOptions(image_column="photo", label_column="kind"))
    assert data.class_names == ["cat", "dog", "emu"]
    batches = list(data.val_dataloader())
    classes = [label for _, labels in batches for label in labels.tolist()]
    assert dict(zip(seen(batches), classes, strict=True)) == {0: 1, 1: 0, 2: 1}
    assert module(source, HFOptions(label_column="year")).class_names == ["9", "10"]


def test_bytes_without_a_type_are_images_where_the_column_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet as pq

    (tmp_path / "raw").mkdir()
    pq.write_table(pyarrow.table({"jpg": [encoded(i) for i in range(4)]}), tmp_path / "raw" / "train.parquet")
    data = module(f"hf:{tmp_path / 'raw'}", HFOptions(image_column="jpg"))
    assert sorted(seen(data.train_dataloader()) + seen(data.val_dataloader())) == [0, 1, 2, 3]


@pytest.mark.parametrize("hf", [HFOptions(), HFOptions(streaming=True, samples_per_epoch=6)])
def test_images_beside_the_table_are_opened(tmp_path: Path, hf: HFOptions) -> None:
    for part, name, number in itertools.product(("train", "test"), ("x", "y"), range(3)):
        file = tmp_path / "data" / part / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number))
    data = module(f"hf:{tmp_path / 'data'}", hf, batch_size=6)
    assert data.class_names == ["x", "y"]
    assert sorted(seen(data.train_dataloader())) == sorted(seen(data.val_dataloader())) == [0, 0, 1, 1, 2, 2]
    place = (tmp_path / "data" / "test" / "x" / "2.png").as_uri()
    assert load_encoded({"bytes": None, "path": place}).getpixel((0, 0)) == (2, 0, 7), "as streams from the hub name it"


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"train_split": "a", "image_column": "x"}, "hf.image_column must be one of image, label, fine, got 'x'"),
        ({"train_split": "a", "label_column": "x"}, "hf.label_column must be one of image, label, fine, got 'x'"),
        ({"train_split": "a"}, "hf.label_column must be given, as several are of type ClassLabel: label, fine"),
        ({"train_split": "x"}, "hf.train_split must be one of a, b, got 'x'"),
        ({"train_split": "a", "val_split": "x"}, "hf.val_split must be one of a, b, got 'x'"),
        ({}, "hf.train_split must name one of a, b of source"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, hf: dict[str, Any], message: str) -> None:
    rows = table(3).add_column("fine", [0, 1, 2]).cast_column("fine", datasets.ClassLabel(names=NAMES))
    source = on_disk(tmp_path / "data", a=rows, b=rows)
    with pytest.raises(ValueError, match=message):
        _ = module(source, HFOptions(**hf)).num_classes


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source 'hf:nobody/nothing' is no folder or file here, and cannot be had"):
        _ = module("hf:nobody/nothing").num_classes
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be read: "):
        _ = module(f"hf:{tmp_path / 'empty'}").num_classes
    for write in (on_disk, parquet):
        source = write(tmp_path / write.__name__, train=table(2))
        with pytest.raises(ValueError, match=f"holds no images, .*; '{source}' reads it as a data set of Hugging Face"):
            _ = module(source.removeprefix("hf:")).num_classes
    words = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(ValueError, match=r"hf.image_column must be given .* text \(.*label \("):
        _ = module(on_disk(tmp_path / "words", train=words)).num_classes
    unlabelled = table(4, label=[0, 1, -1, None]).cast_column("label", datasets.ClassLabel(names=NAMES))
    source = on_disk(tmp_path / "hidden", train=table(4), test=unlabelled)
    with pytest.raises(ValueError, match=r"2 of 4 rows of .* test have a 'label' that is none .* the first is row 2"):
        _ = module(source).num_classes
    assert len(seen(module(source, HFOptions(val_split="train")).val_dataloader())) == 1
    with pytest.raises(ValueError, match=r"split 'test' .* lacks the column 'label'"):
        _ = module(on_disk(tmp_path / "c", train=table(3), test=table(3).remove_columns("label"))).num_classes
    with pytest.raises(ValueError, match=r"hf.buffer must be positive, got 0"):
        HFOptions(buffer=0)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"fvar-lightning\[hf\]"):
        _ = module("hf:nobody/nothing").num_classes


def test_options_parse_as_on_the_command_line(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    args = ["--data.source=hf:owner/name", "--data.hf.streaming=true", "--data.hf.label_column=y"]
    data = parser.instantiate(parser.parse_args(args)).data
    assert data.options.hf == HFOptions(streaming=True, label_column="y")


def broken(count: int, bad: dict[int, Any], first: int = 0) -> Any:
    images = [bad.get(i, {"bytes": encoded(first + i), "path": None}) for i in range(count)]
    return table(count, image=images).cast_column("image", datasets.Image())


BAD = {2: {"bytes": b"?", "path": None}, 5: None, 7: {"bytes": encoded(7)[:60], "path": "cut.png"}}


def test_broken_images_are_replaced_counted_and_named(tmp_path: Path) -> None:
    data = module(on_disk(tmp_path / "data", train=broken(12, BAD), test=table(1)), batch_size=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sorted(seen(data.train_dataloader())) == [0, 1, 3, 3, 4, 6, 6, 8, 8, 9, 10, 11]
        data.teardown("fit")
    assert data._data.train.num_unreadable == 3
    messages = [str(w.message) for w in caught]
    for row in BAD:
        assert sum(f"train[{row}] replaced" in message for message in messages) == 1
    assert "3 of 12 images" in messages[-1]
    assert all(f"train[{row}]" in messages[-1] for row in BAD)


def test_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    source = on_disk(tmp_path / "data", train=table(8), test=table(3))
    first = module(source)
    assert fingerprint(first.real_images("train")) == fingerprint(module(source).real_images("train"))
    others = [first.real_images("val"), module(source, image_size=16, resize="adm").real_images("train")]
    others.append(module(on_disk(tmp_path / "other", train=table(8, 1))).real_images("train"))
    assert len({fingerprint(part) for part in [first.real_images("train"), *others]}) == 4


# ---- streams -------------------------------------------------------------------------------------------------------

STREAM = HFOptions(streaming=True, buffer=5, samples_per_epoch=48)


def test_stream_shows_everything_once_in_another_order_every_epoch(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", 4, train=table(48), validation=table(5, 100))
    data = module(source, STREAM)
    loader = data.train_dataloader()
    assert len(loader) == 12
    epochs = [seen(loader)]
    loader.sampler.set_epoch(1)
    epochs.append(seen(loader))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(48))
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert epochs[0] == seen(module(source, STREAM).train_dataloader()), "the same in every run"
    assert epochs[0] != seen(module(source, STREAM, seed=1).train_dataloader())
    for pixels, labels in loader:
        assert labels.tolist() == [number % 3 for number in numbers(pixels)]
    assert isinstance(data._data.val, HFDataset)
    assert sorted(seen(data.val_dataloader())) == list(range(100, 105))


def test_only_the_validation_part_of_a_stream_is_fetched(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", 2, train=table(300), validation=table(4, 1000))
    whole = module(source, HFOptions())
    assert len(whole._data.train) == 300
    files = list((tmp_path / "cache").rglob("*train*.arrow"))
    assert files
    for file in files:
        file.unlink()
    assert len(seen(module(source, STREAM).val_dataloader())) == 4
    assert not list((tmp_path / "cache").rglob("*train*.arrow"))


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (2, 2), (3, 1)])
def test_readers_share_a_stream_without_overlap(tmp_path: Path, shards: int, ranks: int, workers: int) -> None:
    data = module(parquet(tmp_path / "data", shards, train=table(48)), STREAM, val_fraction=0)
    stream = data._data.train
    shares = []
    for rank in range(ranks):
        sampler = StreamSampler(stream, batch_size=2, workers=workers, num_replicas=ranks, rank=rank)
        draws = list(sampler)
        assert len(draws) == len(sampler) == 48 // ranks
        # a data set of its own for every reader, as the workers have
        by_reader = [[d for d in draws if d.reader == reader] for reader in range(ranks * workers)]
        shares += [numbers(torch.stack([stream[d][0] for d in mine])) for mine in by_reader if mine]
    assert len(shares) == ranks * workers
    whole = [set(share) for share in shares]
    assert len(set().union(*whole)) == sum(map(len, whole)), "no two readers see the same image"
    if shards % (ranks * workers) == 0 or shards == 1:
        assert sorted(itertools.chain(*shares)) == list(range(48)), "equal shares are all of it"


def test_a_stream_is_where_it_was_after_any_number_of_samples(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", 3, train=table(50))
    stream = module(source, STREAM, val_fraction=0, random_crop=True, flip=True)._data.train
    draws = [StreamDraw(2, 1, 2, i) for i in range(60)]  # more than its share: it begins again
    first = [stream[draw] for draw in draws]
    for start in (0, 7, 24, 59):
        again = module(source, STREAM, val_fraction=0, random_crop=True, flip=True)._data.train
        pairs = zip((again[draw] for draw in draws[start:]), first[start:], strict=True)
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in pairs)


class Recorder(LightningModule):
    """Keeps the pictures it is shown."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.die_at = die_at
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.die_at:
            raise RuntimeError("killed")
        self.seen.append(numbers(batch.images.add(1).mul(127.5).round()))
        return self.layer(batch.images.mean().reshape(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_on_a_stream_sees_what_an_undisturbed_one_sees(tmp_path: Path, num_workers: int) -> None:
    source = parquet(tmp_path / "data", 4, train=broken(48, BAD))

    def run(task: Recorder, callbacks: list[Any], path: str | None) -> Recorder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=callbacks, **quiet)
        data = module(source, STREAM, val_fraction=0, num_workers=num_workers)
        trainer.fit(task, datamodule=data, ckpt_path=path)
        return task

    whole = run(Recorder(), [], None)
    assert len(whole.seen) == 24
    assert whole.seen[:12] != whole.seen[12:]
    checkpoint = ModelCheckpoint(tmp_path, filename="it", every_n_train_steps=17)
    with pytest.raises(RuntimeError, match="killed"):
        run(Recorder(die_at=20), [checkpoint], None)
    resumed = run(Recorder(), [], str(tmp_path / "it.ckpt"))
    assert resumed.seen == whole.seen[17:]


def test_another_number_of_workers_is_told(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", train=table(8))
    loaders = [module(source, STREAM, val_fraction=0, num_workers=n).train_dataloader() for n in (0, 1, 2)]
    state = loaders[0].state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaders[1].load_state_dict(state)
    with pytest.warns(UserWarning, match="'workers': 1.*'workers': 2"):
        loaders[2].load_state_dict(state)


def test_broken_images_of_a_stream_are_replaced_counted_and_named(tmp_path: Path) -> None:
    bad = table(24, label=[None, 3, *[0] * 22]).cast_column("label", datasets.ClassLabel(num_classes=4))
    labels = bad["label"]
    rows = broken(24, BAD).remove_columns("label").add_column("label", labels)
    rows = rows.cast_column("label", datasets.ClassLabel(names=["a", "b", "c", "d"]))
    data = module(parquet(tmp_path / "data", train=rows), STREAM, val_fraction=0, num_workers=1)
    loader = data.train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(seen(loader)) == 48
        loader.sampler.set_epoch(1)
        assert not {0, *BAD} & set(seen(loader))
    assert data._data.train.num_unreadable == 4, "met again and again, counted once"
    with pytest.warns(UserWarning, match=r"unreadable training images, .*: 4 images: .* train shard 0 row 0, "):
        data.teardown("fit")
    few = module(f"hf:{tmp_path / 'data'}", STREAM, val_fraction=0, max_unreadable=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"too many unreadable images .* 3 images: "):
            seen(few.train_dataloader())


def test_what_a_stream_cannot_do_is_refused(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", train=table(6))
    with pytest.raises(ValueError, match=r"val_fraction 0.25 cannot be held out of a stream"):
        _ = module(source, STREAM).num_classes
    with pytest.raises(ValueError, match=r"hf.samples_per_epoch must be given, as .* does not tell its length"):
        _ = module(source, HFOptions(streaming=True), val_fraction=0).num_classes
    with pytest.raises(ValueError, match="predict 'tokens' needs images in order"):
        module(source, STREAM, val_fraction=0, predict="tokens").predict_dataloader()
    with pytest.raises(ValueError, match="real 'train' images of a stream"):
        module(source, STREAM, val_fraction=0).real_images("train")
    assert module(source, STREAM, val_fraction=0).val_dataloader() == []
    words = parquet(tmp_path / "words", train=table(3).remove_columns("label").add_column("kind", ["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"hf.label_column of a stream must be of type ClassLabel, 'kind' is"):
        _ = module(words, HFOptions(streaming=True, label_column="kind"), val_fraction=0).num_classes
    few = module(source, STREAM, val_fraction=0)._data.train
    with pytest.raises(RuntimeError, match="too short for 9 readers"):
        few[StreamDraw(0, 8, 9, 0)]


def test_a_saved_data_set_streams_too_and_tells_its_length(tmp_path: Path) -> None:
    data = module(on_disk(tmp_path / "data", train=table(20), test=table(2)), HFOptions(streaming=True, buffer=8))
    assert sorted(seen(data.train_dataloader())) == list(range(20))


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_trains_on_a_stream_from_the_command_line(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", 2, train=table(24), validation=table(4))
    conf = Path(__file__).parent / "conf" / "structure.yaml"
    cli = main(["fit", f"--config={conf}", f"--data.source={source}", "--data.hf.streaming=true",
                "--data.hf.samples_per_epoch=12", "--trainer.max_steps=4", "--trainer.logger=false",
                f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert cli.model.trainer.global_step == 4
    assert len(cli.datamodule.train_dataloader()) == 3
    assert cli.datamodule.class_names == NAMES
