"""File lists of image folders, kept on disk: a million files are listed once, not in every process of every run."""

import hashlib
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from fvar_lightning.atomic import replacing

FORMAT = 1
LEAST_FILES = 10_000
"""Shorter lists are not kept: reading the folder again costs less than a file in the cache."""
SETTLED_NS = 2_000_000_000
"""A folder changed this shortly before it was read could change again without its times telling, so it is not kept."""


class ImageList(NamedTuple):
    """Image files of a folder. Arrays, not lists: worker processes share them instead of copying them."""

    root: Path
    files: np.ndarray
    """(N,) bytes, paths relative to the root, separated by slashes."""
    labels: np.ndarray
    """(N,) int64."""


class Listing(NamedTuple):
    """What one walk over a folder found."""

    class_names: list[str]
    train: ImageList
    val: ImageList
    left_out: list[str]
    """Entries named like images that are none, and folders that cannot be opened."""
    folders: list[bytes]
    """Every folder that was read, relative to the source."""
    times: np.ndarray
    """(F, 2) int64: times of change of contents and of state of each of them, in ns, taken before it was read."""


def user_cache() -> Path:
    """``fvar-lightning`` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fvar-lightning"


def kept(source: Path, settings: str, scan: Callable[[], Listing]) -> Listing:
    """The listing of a folder: the one kept in the user's cache if it still holds, otherwise that of `scan`.

    It holds while the times of all its folders are what they were: creating, removing and renaming files and folders
    changes them. Overwriting a file does not, nor does it change the list. So a check costs a call a folder, not one
    a file; what it does not see is that the target of a broken link has come back. Of several processes of a machine
    that ask for the same folder, one scans and the others wait for its list.

    Args:
        source: the folder; two paths to the same folder share a list.
        settings: whatever else the listing depends on.
        scan: makes the listing.
    """
    key = f"{FORMAT}\0{source.resolve()}\0{settings}"
    path = user_cache() / "listings" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"
    if (listing := _read(path, source)) is not None:
        return listing
    with _alone(path):
        if (listing := _read(path, source)) is not None:
            return listing
        started = time.time_ns()
        listing = scan()
        images = len(listing.train.files) + len(listing.val.files)
        if images >= LEAST_FILES and listing.times.max() <= started - SETTLED_NS:
            try:
                _write(path, source, listing)
            except OSError as error:
                warnings.warn(f"the list of {images} images cannot be kept for the next run: {error}", stacklevel=2)
        return listing


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; where the cache cannot be written, every process scans for itself."""
    lock = FileLock(path.with_suffix(".lock"))
    with suppress(OSError, NotImplementedError):  # the second where a file system knows no locks
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()
            with suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)


def folder_times(status: os.stat_result) -> tuple[int, int]:
    """When the entries of a folder changed last, and when its own state did, in ns."""
    return status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path, source: Path) -> Listing | None:
    """The listing in a file, or None if there is none, it is broken, or a folder has changed."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        folders = arrays["folders"].tolist()
        times = [folder_times(os.stat(os.path.join(os.fsencode(source), folder))) for folder in folders]
        if not np.array_equal(arrays["times"], np.array(times)):
            return None
        train, val = (
            ImageList(source / os.fsdecode(arrays[f"{part}_root"].item()), arrays[part], arrays[f"{part}_labels"])
            for part in ("train", "val")
        )
        names, left_out = ([os.fsdecode(n) for n in arrays[name].tolist()] for name in ("class_names", "left_out"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Listing(names, train, val, left_out, folders, arrays["times"])


def _write(path: Path, source: Path, listing: Listing) -> None:
    arrays = {
        "class_names": path_array(map(os.fsencode, listing.class_names)),
        "left_out": path_array(map(os.fsencode, listing.left_out)),
        "folders": path_array(listing.folders),
        "times": listing.times,
    }
    for part, images in (("train", listing.train), ("val", listing.val)):
        arrays[f"{part}_root"] = np.array(os.fsencode(images.root.relative_to(source)))
        arrays[part], arrays[f"{part}_labels"] = images.files, images.labels
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the name of an array for an option


def path_array(paths: Iterator[bytes] | list[bytes]) -> np.ndarray:
    """(N,) bytes."""
    return np.array(list(paths), dtype=np.bytes_)
