"""Walking over folders of many files: how much is read, what is kept, and when it is read again."""

import hashlib
import os
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fvar_lightning.data import listings
from fvar_lightning.data.folders import scan_folder
from fvar_lightning.data.listings import ImageList, Listing, kept, user_cache

CLASSES, EACH = 100, 200


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 000 empty files in a hundred class folders."""
    root = tmp_path_factory.mktemp("many")
    for c in range(CLASSES):
        folder = root / f"class{c:03d}"
        folder.mkdir()
        for i in range(EACH):
            os.close(os.open(folder / f"{i}.JPEG", os.O_CREAT))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and folders that count as settled though the test has just made them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "SETTLED_NS", -(10**12))
    return tmp_path / "cache" / "fvar-lightning" / "listings"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Folders read, and files or folders asked for their state."""
    counts = {"scandir": 0, "stat": 0}

    def counting(name: str) -> Callable:
        original = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            counts[name] += 1
            return original(*args, **options)

        return call

    for name in counts:
        monkeypatch.setattr(os, name, counting(name))
    return counts


def paths(found: tuple[list[str], ImageList, ImageList]) -> list[bytes]:
    return sorted(found[1].files.tolist() + found[2].files.tolist())


def test_every_folder_is_read_once_and_never_again(many: Path, cache: Path, calls: dict[str, int]) -> None:
    first = scan_folder(many)
    assert calls["scandir"] == CLASSES + 1
    assert calls["stat"] < CLASSES + 30, "no file is asked for its state"
    assert [len(first[0]), len(first[1].files), len(first[2].files)] == [CLASSES, 18_000, 2_000]
    assert [path.suffix for path in cache.iterdir()] == [".npz"], "one list, and no lock left behind"

    calls.update(scandir=0, stat=0)
    second = scan_folder(many)
    assert calls["scandir"] == 0
    assert calls["stat"] < CLASSES + 30
    assert second[0] == first[0]
    for ours, theirs in zip(second[1:], first[1:], strict=True):
        assert ours.root == theirs.root
        np.testing.assert_array_equal(ours.files, theirs.files)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    scan_folder(many, 0.2)
    assert calls["scandir"] == CLASSES + 1, "another part held out is another list"


def test_the_part_held_out_is_chosen_by_a_hash_of_the_path(many: Path) -> None:
    _, train, val = scan_folder(many, 0.05)
    for c in (0, 57):
        names = [f"class{c:03d}/{i}.JPEG" for i in range(EACH)]
        chosen = sorted(names, key=lambda name: hashlib.blake2b(name.encode()).digest())[:10]
        assert [file.decode() for file in val.files[val.labels == c]] == sorted(chosen)
        assert [file.decode() for file in train.files[train.labels == c]] == sorted(set(names) - set(chosen))


def test_a_link_to_the_folder_shares_its_list_under_its_own_name(
    many: Path, tmp_path: Path, calls: dict[str, int]
) -> None:
    scan_folder(many)
    calls["scandir"] = 0
    (tmp_path / "link").symlink_to(many)
    assert scan_folder(tmp_path / "link")[1].root == tmp_path / "link"
    assert calls["scandir"] == 0


def test_changes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]) -> None:
    monkeypatch.setattr(listings, "LEAST_FILES", 1)
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    for folder in (train / "one", train / "two" / "deep", val / "two"):
        folder.mkdir(parents=True)
        (folder / "a.png").touch()

    def new_folder() -> None:
        (train / "one" / "x" / "y").mkdir(parents=True)
        (train / "one" / "x" / "y" / "c.png").touch()

    before = scan_folder(tmp_path / "data")
    for change in (
        lambda: (train / "one" / "new.png").touch(),
        lambda: (train / "one" / "new.png").unlink(),
        lambda: (val / "two" / "a.png").rename(val / "two" / "b.png"),
        new_folder,
        lambda: (train / "one" / "x" / "y" / "d.png").touch(),
        lambda: (train / "two").rename(train / "two!"),
    ):
        calls["scandir"] = 0
        assert paths(scan_folder(tmp_path / "data")) == paths(before)
        assert calls["scandir"] == 0
        time.sleep(0.02)  # coarse clocks of file systems tick every few milliseconds
        change()
        if (val / "two").is_dir() and not (train / "two").is_dir():
            (val / "two").rename(val / "two!")
        after = scan_folder(tmp_path / "data")
        on_disk = [path.relative_to(root) for root in (train, val) for path in root.rglob("*.png")]
        assert paths(after) == sorted(map(os.fsencode, on_disk)) != paths(before)
        before = after


def test_a_folder_changed_just_now_is_not_kept(many: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "SETTLED_NS", 3600 * 10**9)
    scan_folder(many)
    assert not list(cache.iterdir())


def test_short_lists_are_not_kept(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.png").touch()
    scan_folder(tmp_path / "few")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_broken_list_is_written_again(many: Path, cache: Path, calls: dict[str, int], content: bytes) -> None:
    expected = paths(scan_folder(many))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    assert paths(scan_folder(many)) == expected
    assert file.read_bytes() == whole


def test_without_a_cache_folder_every_process_scans(many: Path, tmp_path: Path, calls: dict[str, int]) -> None:
    user_cache().parent.parent.mkdir(exist_ok=True)
    user_cache().parent.write_bytes(b"a file where a folder should be")
    for i in (1, 2):
        with pytest.warns(UserWarning, match="the list of 20000 images cannot be kept"):
            scan_folder(many)
        assert calls["scandir"] == i * (CLASSES + 1)


def test_of_many_that_ask_one_scans(tmp_path: Path) -> None:
    scans = []

    def scan() -> Listing:
        scans.append(1)
        time.sleep(0.1)
        images = ImageList(tmp_path, np.array([b"%d.png" % i for i in range(10_000)]), np.zeros(10_000, np.int64))
        times = [listings.folder_times(os.stat(tmp_path))]
        return Listing(["a"], images, images._replace(files=images.files[:0]), [], [b""], np.array(times))

    cache = tmp_path / "cache"
    cache.mkdir()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kept(tmp_path, "", scan), range(4)))
    assert len(scans) == 1
    assert all(len(listing.train.files) == 10_000 for listing in found)


def test_what_is_no_file_is_left_out_and_named(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a" / "folder.png").mkdir(parents=True)
    (root / "a" / "album.jpg").mkdir()
    for name in ("good.png", "album.jpg/inside.png", ".hidden.png", "notes.txt", "phone.HEIC", "._phone.HEIC"):
        (root / "a" / name).touch()
    (root / "a" / "link.png").symlink_to(root / "a" / "good.png")
    (root / "a" / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    (root / "a" / "up").symlink_to(root)
    os.mkfifo(root / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as unix, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "a")  # the path of a socket may have 107 bytes
        unix.bind("socket.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = scan_folder(root, 0)
    assert paths(found) == [b"a/album.jpg/inside.png", b"a/good.png", b"a/link.png"]
    (message,) = [str(w.message) for w in caught]
    assert message.startswith(f"7 entries of {root} are left out: ")
    for entry in (
        "a/folder.png (a folder)",
        "a/dangling.png (a broken link)",
        "a/self.png (a broken link)",
        "a/up (a link to a folder that it lies in)",
        "a/pipe.jpg (no regular file)",
        "a/socket.png (no regular file)",
        "a/phone.HEIC (convert it to PNG or JPEG)",
    ):
        assert entry in message


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    name = b"\xff\xfe.png"
    try:
        os.close(os.open(os.fsencode(tmp_path / "images") + b"/" + name, os.O_CREAT))
    except OSError:
        pytest.skip("this file system has text names only")
    assert paths(scan_folder(tmp_path / "images", 0)) == [name]


def test_a_folder_of_unread_pictures_says_so(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.heic").touch()
    with pytest.raises(
        ValueError, match=r"holds no images.*; left out: .*\.heic \(convert it to PNG or JPEG\).*, \.\.\.$"
    ):
        scan_folder(tmp_path)
