"""torchvision's own classes on tiny files in their formats, and what is refused."""

import json
import pickle
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fvar_lightning.data.fingerprint import fingerprint
from fvar_lightning.data.images import ImageTransform
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.data.torchvision_sets import TorchvisionDataset, load_torchvision
from fvar_lightning.schedule import FocusSchedule

TRAIN, VAL = 12, 5


def pixels(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def write_pictures(folder: Path, names: list[str]) -> None:
    for name, picture in zip(names, pixels(len(names)), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.transpose(1, 2, 0)).save(path)


def write_mnist(root: Path, name: str = "MNIST") -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", TRAIN), ("t10k", VAL)):
        images, labels = pixels(count, 28)[:, 0], np.arange(count, dtype=np.uint8) % 10
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def write_fashion_mnist(root: Path) -> None:
    write_mnist(root, "FashionMNIST")


def write_cifar(root: Path, kind: type, labels: str) -> None:
    folder = root / kind.base_folder
    folder.mkdir()
    # of the ten or so names of the training batches all must be there
    shares = np.array_split(np.arange(TRAIN), len(kind.train_list))
    for (name, _), share in zip(kind.train_list + kind.test_list, [*shares, np.arange(VAL)], strict=True):
        content = {"data": pixels(len(share)).reshape(len(share), -1), labels: (share % 10).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(10)]}))


def write_cifar10(root: Path) -> None:
    write_cifar(root, torchvision.datasets.CIFAR10, "labels")


def write_cifar100(root: Path) -> None:
    write_cifar(root, torchvision.datasets.CIFAR100, "fine_labels")


def write_svhn(root: Path) -> None:
    io = pytest.importorskip("scipy.io")
    for part, count in (("train", TRAIN), ("test", VAL)):
        # 10 stands for the digit 0
        content = {"X": pixels(count).transpose(2, 3, 1, 0), "y": np.arange(1, count + 1)[:, None] % 10 + 1}
        io.savemat(root / f"{part}_32x32.mat", content)


def write_stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", TRAIN), ("test", VAL)):
        (folder / f"{part}_X.bin").write_bytes(pixels(count, 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes((np.arange(count) % 10 + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))


def write_flowers(root: Path) -> None:
    io = pytest.importorskip("scipy.io")
    folder, count = root / "flowers-102", TRAIN + VAL
    write_pictures(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, count + 1)])
    io.savemat(folder / "imagelabels.mat", {"labels": np.arange(count) % 102 + 1})
    io.savemat(
        folder / "setid.mat", {"trnid": np.arange(TRAIN) + 1, "valid": np.arange(TRAIN, count) + 1, "tstid": [1]}
    )


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("trainval", TRAIN), ("test", VAL)):
        names = [f"Breed_{i % 2}_{part}{i}" for i in range(count)]
        write_pictures(folder / "images", [f"{name}.jpg" for name in names])
        lines = "".join(f"{name} {i % 2 + 1} 1 1\n" for i, name in enumerate(names))
        (folder / "annotations" / f"{part}.txt").write_text(lines)


def write_food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for part, count in (("train", TRAIN), ("test", VAL)):
        names = [f"{('pie', 'soup')[i % 2]}/{part}{i}" for i in range(count)]
        write_pictures(folder / "images", [f"{name}.jpg" for name in names])
        by_class = {c: [name for name in names if name.startswith(c)] for c in ("pie", "soup")}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(by_class))


def write_places(root: Path) -> None:
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/alley 1\n")
    for part, count, folder in (("train_standard", TRAIN, "data_large_standard"), ("val", VAL, "val_large")):
        names = [f"{i}.jpg" for i in range(count)]
        write_pictures(root / folder, names)
        lines = "".join(f"{name} {i % 2}\n" for i, name in enumerate(names))
        (root / f"places365_{part}.txt").write_text(lines)


@pytest.mark.parametrize(
    ("name", "write", "first", "classes"),
    [
        ("MNIST", write_mnist, "0 - zero", 10),
        ("FashionMNIST", write_fashion_mnist, "T-shirt/top", 10),
        ("CIFAR10", write_cifar10, "class 0", 10),
        ("CIFAR100", write_cifar100, "class 0", 10),
        ("SVHN", write_svhn, "0", 10),
        ("STL10", write_stl10, "class 0", 10),
        ("Flowers102", write_flowers, "pink primrose", 102),
        ("OxfordIIITPet", write_pets, "Breed 0", 2),
        ("Food101", write_food, "pie", 2),
        ("Places365", write_places, "/a/airfield", 2),
    ],
)
def test_sets_with_parts_of_their_own(
    name: str, write: Callable[[Path], None], first: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torchvision's own classes; the files are not the real ones, so their checksums are not asked for."""
    write(tmp_path)
    module = __import__(getattr(torchvision.datasets, name).__module__, fromlist=["check_integrity"])
    monkeypatch.setattr(module, "check_integrity", lambda *_, **__: True, raising=False)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda _: True)
    names, (train, train_indices), (val, val_indices) = load_torchvision(name, tmp_path)
    assert (names[0], len(names)) == (first, classes)
    assert (len(train_indices), len(val_indices)) == (TRAIN, VAL)
    for part, indices in ((train, train_indices), (val, val_indices)):
        data = TorchvisionDataset(part, names, ImageTransform(16), indices)
        samples = [data[i] for i in range(len(data))]
        assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image, _ in samples)
        assert {label for _, label in samples} <= set(range(classes))
        assert len({label for _, label in samples}) > 1
        assert data.num_unreadable == 0
        assert data.name(2) == f"{name}[2]"
    assert not torch.equal(*(TorchvisionDataset(p, names, ImageTransform(16), [0])[0][0] for p in (train, val)))


def test_a_folder_of_class_folders_holds_some_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(10)])
    names, (train, train_indices), (val, val_indices) = load_torchvision("ImageFolder", tmp_path, 0.25)
    assert names == ["ant", "bee"]
    assert train is val
    assert len(val_indices) == 5
    assert sorted([*train_indices, *val_indices]) == list(range(20))


def test_folders_read_by_torchvision_are_told_apart_by_their_files(tmp_path: Path) -> None:
    def name(folder: str) -> str:
        names, (train, indices), _ = load_torchvision("ImageFolder", tmp_path / folder)
        return fingerprint(TorchvisionDataset(train, names, ImageTransform(16), indices))

    for folder in ("one", "other"):
        write_pictures(tmp_path / folder, [f"ant/{i}.png" for i in range(10)])
    assert name("one") == name("one")
    assert name("one") != name("other")


def test_the_root_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"root '{tmp_path}/sets' does not hold the data set CIFAR10"):
        load_torchvision("CIFAR10", "~/sets")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FashionMINST", "'FashionMINST' is no data set of torchvision"),
        ("CIFAR10", r"does not hold the data set CIFAR10 .*--data.download=true fetches it"),
        ("SVHN", r"does not hold the data set SVHN .*--data.download=true fetches it"),
        ("QMNIST", r"does not hold the data set QMNIST .*--data.download=true fetches it"),
        ("ImageNet", r"does not hold the data set ImageNet .*torchvision cannot download it"),
        ("EMNIST", "'EMNIST' cannot be used, it takes other arguments: .*'split'"),
        ("Kinetics", "'Kinetics' cannot be used, it takes other arguments: .*'frames_per_clip'"),
        ("CocoCaptions", "'CocoCaptions' cannot be used, it takes other arguments: .*'annFile'"),
        ("FakeData", "'FakeData' cannot be used, it takes other arguments: .*'root'"),
    ],
)
def test_refusals(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_torchvision(name, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is written where nothing is to be downloaded"


class StandIn(torchvision.datasets.VisionDataset):
    """Takes its time to download, as if no other process were there."""

    classes = ("zero", "one")
    target: object = 1
    downloads: list[str]

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root)
        done = Path(root, "train" if train else "test")
        if download and not done.exists():
            self.downloads.append(done.name)
            time.sleep(0.05)
            done.touch()
        if not done.exists():
            raise RuntimeError("not found")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        return Image.new("L", (8, 8), index), self.target


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    StandIn.downloads = []
    monkeypatch.setattr(torchvision.datasets, "USPS", StandIn)
    return StandIn


def test_one_downloads_while_the_others_wait(stand_in: type[StandIn], tmp_path: Path) -> None:
    """Threads hold locks of their own on the file, as processes do."""
    found = []

    def ask() -> None:
        options = {"source": "USPS", "root": str(tmp_path / "new"), "download": True, "image_size": 16}
        found.append(
            ImageDataModule(schedule=FocusSchedule((1, 2), patch_size=8, focus_states=2), **options).num_classes
        )

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stand_in.downloads == ["train", "test"]
    assert found == [2] * 4


def test_a_failed_download_is_called_so(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(Path, "touch", no_network)
    with pytest.raises(ValueError, match=r"StandIn could not be downloaded into root .*: no route to host"):
        load_torchvision("USPS", tmp_path, download=True)


@pytest.mark.parametrize("target", [torch.zeros(40), (1, 2), {"boxes": []}, None])
def test_other_targets_than_a_class_are_refused(target: object, stand_in: type[StandIn], tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in, "target", target)
        with pytest.raises(ValueError, match="'USPS' is no classification data set, its targets are"):
            load_torchvision("USPS", tmp_path)
