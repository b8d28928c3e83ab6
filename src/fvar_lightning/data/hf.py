"""Data sets of Hugging Face `datasets`: from the hub, or what `save_to_disk`, parquet or arrow files left on disk."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fvar_lightning.data.datasets import ImageDataset
from fvar_lightning.data.images import ImageTransform, load_image

VAL_SPLITS = ("validation", "val", "valid", "test")
SAVED = ("dataset_dict.json", "state.json")
"""Files by which `save_to_disk` is known."""


@dataclass(frozen=True)
class HFOptions:
    """How a data set of Hugging Face is read.

    Args:
        name: configuration, of a data set that has several.
        revision: branch, tag or commit on the hub.
        image_column: by default the one of type Image.
        label_column: by default the one of type ClassLabel; without one all images are of one class. Values of another
            type (numbers, strings) are sorted into classes.
        train_split: by default `train`, or the only one.
        val_split: by default the first there is of validation, val, valid and test; `val_fraction` of the training part
            is held out where there is none, or where it is named here once more.
        streaming: read the training part as it arrives, for sets beyond one disk. See `HFStream`.
        samples_per_epoch: of a stream; by default what the data set tells of its length.
        buffer: samples of a stream that a worker holds and shuffles.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    name: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    streaming: bool = False
    samples_per_epoch: int | None = None
    buffer: int = 1000

    def __post_init__(self) -> None:
        for argument in ("samples_per_epoch", "buffer"):
            value = getattr(self, argument)
            if value is not None and value < 1:
                raise ValueError(f"hf.{argument} must be positive, got {value}")


class HFRows(NamedTuple):
    """A part of a data set. Its images are left encoded."""

    rows: Any
    """`datasets.Dataset`, or `datasets.IterableDataset` of a stream."""
    origin: str
    """Source and split, for messages."""
    image_column: str
    label_column: str | None
    class_values: Sequence[Any]
    """What stands in the label column for every class."""
    length: int | None
    """Number of rows, if it is known."""


class HFDataset(ImageDataset):
    """Rows of a data set on disk. `indices` picks some of them; others as for `ImageDataset`."""

    def __init__(
        self, part: HFRows, class_names: list[str], transform: ImageTransform, indices: np.ndarray, **options: Any
    ) -> None:
        super().__init__(len(indices), class_names, transform, **options)
        self.part = part
        self.images = part.rows.select_columns([part.image_column])  # a label is read once, below
        self.indices = indices
        self.labels = _labels(part)[indices]

    def name(self, index: int) -> str:
        return f"{self.part.origin}[{self.indices[index]}]"

    def read(self, index: int) -> tuple[Image.Image, int]:
        row = self.images[int(self.indices[index])]
        return load_encoded(row[self.part.image_column]), int(self.labels[index])


def load_encoded(image: Mapping[str, Any] | None) -> Image.Image:
    """The picture in the column of a row, as `load_image` reads it; raises whatever the decoder raises."""
    content, path = (None, None) if image is None else (image["bytes"], image["path"])
    if content is not None:
        return load_image(io.BytesIO(content))
    if path is None:
        raise ValueError("the row holds no image")
    if "://" not in path:
        return load_image(path)
    import fsspec  # datasets brings it

    with fsspec.open(path) as file:
        return load_image(file)


def load_hf(path: str, options: HFOptions) -> tuple[list[str], HFRows, HFRows | None]:
    """Class names, training part, and validation part if the data set has its own, of a data set of Hugging Face.

    Of several processes of a machine that need the same data one prepares it. With streaming, the training part is
    read as it arrives, and the validation part alone is fetched.

    Args:
        path: a folder that `save_to_disk` wrote, a folder or file of parquet, arrow or another kind that `datasets`
            reads, or the name of a data set on the hub.
        options: see there.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if there is no such data set here or on the hub, or it lacks a split or column, or its labels.
    """
    datasets = _datasets()
    found = _load(path, options)
    train_split = _split(found, options.train_split, ("train",), "train_split")
    if train_split is None:
        raise ValueError(f"hf.train_split must name one of {_listed(found)} of source 'hf:{path}'")
    val_split = _split(found, options.val_split, VAL_SPLITS, "val_split")
    train = found[train_split]
    if train.features is None:
        raise ValueError(f"source 'hf:{path}' tells no columns when streamed; parquet and arrow files do")
    image, label = _columns(train.features, options)
    feature = None if label is None else train.features[label]
    if label is None:
        values, names = [], [Path(path).name]
    elif isinstance(feature, datasets.ClassLabel):
        values, names = list(range(feature.num_classes)), list(feature.names)
    elif options.streaming:
        raise ValueError(f"hf.label_column of a stream must be of type ClassLabel, {label!r} is {feature}")
    else:
        values = sorted(value for value in train.unique(label) if value is not None)
        names = [str(value) for value in values]

    def part(split: str) -> HFRows:
        rows = found[split]
        told = (rows.info.splits or {}).get(split)
        length = len(rows) if isinstance(rows, datasets.Dataset) else told and told.num_examples
        if options.streaming and split == train_split:
            if isinstance(rows, datasets.Dataset):
                rows = rows.to_iterable_dataset(num_shards=min(len(rows), 256))
        elif isinstance(rows, datasets.IterableDataset):
            rows = _fetch(path, options, split, rows.features)
        if missing := [column for column in (image, label) if column is not None and column not in rows.column_names]:
            raise ValueError(f"split {split!r} of source 'hf:{path}' lacks the column {missing[0]!r}")
        rows = rows.select_columns([image] if label is None else [image, label])
        rows = rows.cast_column(image, datasets.Image(decode=False))
        return HFRows(rows, f"hf:{path} {split}", image, label, values, length)

    return names, part(train_split), None if val_split in (None, train_split) else part(val_split)


def is_hf_folder(path: str) -> bool:
    """Whether `save_to_disk`, or parquet files, are there."""
    place = Path(path).expanduser()
    found = (place.glob(pattern) for pattern in (*SAVED, "*.parquet", "data/*.parquet"))
    return any(True for paths in found for _ in paths)


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("source 'hf:...' needs datasets: pip install 'fvar-lightning[hf]'") from error
    return datasets


@contextmanager
def _reading(path: str) -> Iterator[Path]:
    """The path as a place on disk, for a block whose errors are of many kinds: the hub's, the network's, the files'."""
    place = Path(path).expanduser()
    try:
        yield place
    except Exception as error:
        where = "cannot be read" if place.exists() else "is no folder or file here, and cannot be had from the hub"
        raise ValueError(f"source 'hf:{path}' {where}: {type(error).__name__}: {error}") from None


def _load(path: str, options: HFOptions) -> Mapping[str, Any]:
    """Splits by name."""
    datasets = _datasets()
    with _reading(path) as place:
        if any((place / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(place))
        elif place.is_file():
            kind = place.suffix.lstrip(".")
            found = datasets.load_dataset(kind, data_files=str(place), streaming=options.streaming)
        else:
            known = {"name": options.name, "revision": options.revision, "streaming": options.streaming}
            found = datasets.load_dataset(str(place) if place.is_dir() else path, **known)
    return found if isinstance(found, dict) else {str(found.split or "train"): found}


def _fetch(path: str, options: HFOptions, split: str, features: Any) -> Any:
    """One split on disk; `load_dataset` alone would fetch all of them."""
    datasets = _datasets()
    with _reading(path) as place:
        where = str(place) if place.is_dir() else path
        builder = datasets.load_dataset_builder(where, options.name, revision=options.revision)
        if not builder.config.data_files:  # one that makes its rows
            builder.download_and_prepare()
            return builder.as_dataset(split=split)
        files = {split: list(builder.config.data_files[split])}
        return datasets.load_dataset(builder.name, data_files=files, split=split, features=features)


def _split(found: Iterable[str], asked: str | None, usual: Iterable[str], argument: str) -> str | None:
    names = list(found)
    if asked is None:
        only = names[:1] if len(names) == 1 and argument == "train_split" else []
        return next((name for name in (*usual, *only) if name in names), None)
    if asked not in names:
        raise ValueError(f"hf.{argument} must be one of {_listed(names)}, got {asked!r}")
    return asked


def _columns(features: Mapping[str, Any], options: HFOptions) -> tuple[str, str | None]:
    datasets = _datasets()
    for argument in ("image_column", "label_column"):
        if (asked := getattr(options, argument)) is not None and asked not in features:
            raise ValueError(f"hf.{argument} must be one of {_listed(features)}, got {asked!r}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if options.image_column is None and len(images) != 1:
        kinds = ", ".join(f"{name} ({feature})" for name, feature in features.items())
        raise ValueError(f"hf.image_column must be given where not exactly one is of type Image: {kinds}")
    if options.label_column is None and len(labels) > 1:
        raise ValueError(f"hf.label_column must be given, as several are of type ClassLabel: {_listed(labels)}")
    return options.image_column or images[0], options.label_column or (labels[0] if labels else None)


def _labels(part: HFRows) -> np.ndarray:
    """(N,) int64, number of the class of every row."""
    import pyarrow
    import pyarrow.compute

    if part.label_column is None:
        return np.zeros(len(part.rows), dtype=np.int64)
    column = part.rows.select_columns([part.label_column]).with_format("arrow")[:][part.label_column]
    known = pyarrow.array(part.class_values, type=column.type)
    labels = pyarrow.compute.index_in(column, value_set=known).fill_null(-1).to_numpy().astype(np.int64)
    without = np.flatnonzero(labels < 0)
    if len(without):
        raise ValueError(
            f"{len(without)} of {len(labels)} rows of {part.origin} have a {part.label_column!r} that is none of the "
            f"{len(part.class_values)} classes, the first is row {without[0]}; hf.train_split and hf.val_split choose "
            "other splits, naming the same one twice holds out val_fraction of it"
        )
    return labels


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
