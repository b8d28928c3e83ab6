"""scan_folder(): classes, training and validation images of a folder, in one walk."""

import hashlib
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvar_lightning.data.images import EXTENSIONS, UNREAD
from fvar_lightning.data.listings import ImageList, Listing, folder_times, kept, path_array

_ENDINGS = tuple(os.fsencode(extension) for extension in EXTENSIONS)
_VAL = (b"val", b"valid", b"validation")
_UNREAD = tuple(os.fsencode(extension) for extension in UNREAD)


def scan_folder(source: str | Path, val_fraction: float = 0.1) -> tuple[list[str], ImageList, ImageList]:
    """Class names (sorted), training and validation images of a folder.

    The folder holds class folders (searched to any depth, but for hidden ones), or images alone: one class, named after
    the folder. If it holds `train` and `val` folders (or `valid`, `validation`), these are the two parts, and what lies
    beside them is left out; otherwise `val_fraction` of every class is held out, chosen by a hash of the path: the same
    on every machine, and at least one image of a class that has two.

    Images are regular files and links to such; pipes, sockets, broken links, folders named like images and pictures of
    formats that are not read, such as HEIC, are left out with a warning that names them. Long lists are kept, see
    `kept`.

    Raises:
        ValueError: if the folder is missing or holds no images, if a class has none, if images lie beside class
            folders, if `train` alone lies beside folders that may be classes, or if `val` has a class that `train`
            lacks.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    source = Path(source).expanduser()
    if not source.is_dir():
        raise ValueError(f"source {str(source)!r} is not a folder")
    settings = f"{val_fraction} {EXTENSIONS} {UNREAD}"
    listing = kept(source, settings, lambda: _Walk(source).listing(val_fraction))
    if listing.left_out:
        warnings.warn(
            f"{len(listing.left_out)} entries of {source} are left out: {_few(listing.left_out)}", stacklevel=2
        )
    return listing.class_names, listing.train, listing.val


class _Walk:
    """Reads every folder of a source once, and remembers which they were, and what was left out.

    Folders are bytes relative to the source, as the file system has them; file names need not be UTF-8.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.folders: list[bytes] = []
        self.times: list[tuple[int, int]] = []
        self.left_out: list[str] = []

    def listing(self, val_fraction: float) -> Listing:
        """Classes and parts, as `scan_folder` tells."""
        entries = self._entries(b"", ())
        split, own_val = self._parts(entries.folders)
        train_root = val_root = self.source
        if split:
            train_root = val_root = self.source / "train"
            entries = self._entries(b"train", (entries.identity,))
        train = self._classes(train_root, entries)
        names = list(train)
        if own_val:
            val_root = self.source / os.fsdecode(own_val)
            val = self._classes(val_root, self._entries(own_val, ()))
            unknown = sorted(val.keys() - train.keys())
            if unknown:
                raise ValueError(f"{val_root} has classes that {train_root} lacks: {', '.join(unknown)}")
        else:
            held_out = {name: _held_out(files, val_fraction) for name, files in train.items()}
            val = {name: files[held_out[name]] for name, files in train.items()}
            train = {name: files[~held_out[name]] for name, files in train.items()}
        parts = _image_list(train_root, train, names), _image_list(val_root, val, names)
        return Listing(names, *parts, self.left_out, self.folders, np.array(self.times, dtype=np.int64))

    def _parts(self, folders: list[bytes]) -> tuple[bool, bytes | None]:
        """Whether there is a training folder, and the name of the validation folder beside it."""
        source = repr(str(self.source))
        if b"train" not in folders:
            if b"val" in folders:
                raise ValueError(f"source {source} holds a folder val, but no folder train")
            return False, None
        own_val = [name for name in _VAL if name in folders]
        if len(own_val) > 1:
            raise ValueError(f"source {source} must hold one validation folder, got {_few_of(own_val)}")
        others = sorted(set(folders) - {b"train", *own_val})
        if not own_val and set(others) - {b"test"}:
            raise ValueError(
                f"source {source} holds a folder train beside {_few_of(others)}: if it is the training part, move the "
                "others elsewhere; if it is a class, give it another name"
            )
        for name in others:
            self._leave_out(name, "beside train")
        return True, own_val[0] if own_val else None

    def _classes(self, root: Path, entries: "_Entries") -> dict[str, np.ndarray]:
        """Sorted image paths, relative to the root, of every class, by name."""
        classes = {}
        for folder in sorted(entries.folders, key=os.fsdecode):
            files = self._images(os.path.join(entries.folder, folder), folder, (entries.identity,))
            if files or not _is_image(folder):
                classes[os.fsdecode(folder)] = path_array(sorted(files))
        accepted = " ".join(EXTENSIONS)
        filled = [name for name, files in classes.items() if len(files)]
        if not entries.images and not filled:
            left_out = f"; left out: {_few(self.left_out)}" if self.left_out else ""
            raise ValueError(
                f"{root} holds no images, nor class folders with images (files ending in {accepted}){left_out}"
            )
        if entries.images:
            flat = sorted(entries.images)
            if filled:
                raise ValueError(
                    f"{root} holds images ({os.fsdecode(flat[0])}, ...) beside class folders ({filled[0]}, ...)"
                )
            return {self.source.resolve().name: path_array(flat)}
        empty = [name for name in classes if name not in filled]
        if empty:
            raise ValueError(f"class folders of {root} without images (files ending in {accepted}): {', '.join(empty)}")
        return classes

    def _images(self, folder: bytes, inside: bytes, above: tuple["_Identity", ...]) -> list[bytes]:
        """Images of a folder and those in it; `inside` is its path below the root, `above` the folders it lies in."""
        try:
            entries = self._entries(folder, above)
        except OSError as error:
            self._leave_out(folder, error.strerror or "unreadable")
            return []
        found = [b"%s/%s" % (inside, name) for name in entries.images]
        for name in entries.folders:
            found += self._images(os.path.join(folder, name), b"%s/%s" % (inside, name), (*above, entries.identity))
        if not found and _is_image(folder):
            self._leave_out(folder, "a folder")
        return found

    def _entries(self, folder: bytes, above: tuple["_Identity", ...]) -> "_Entries":
        path = os.path.join(os.fsencode(self.source), folder)
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        if identity in above:
            raise OSError(0, "a link to a folder that it lies in")
        self.folders.append(folder)
        self.times.append(folder_times(status))
        images, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not entry.name.startswith(b"."):
                        folders.append(entry.name)
                elif _is_image(entry.name):
                    if _is_file(entry):
                        images.append(entry.name)
                    else:
                        link = "a broken link" if entry.is_symlink() else "no regular file"
                        self._leave_out(os.path.join(folder, entry.name), link)
                elif _ends(entry.name, _UNREAD):
                    self._leave_out(os.path.join(folder, entry.name), "convert it to PNG or JPEG")
        return _Entries(folder, images, folders, identity)

    def _leave_out(self, path: bytes, reason: str) -> None:
        self.left_out.append(f"{os.fsdecode(path)} ({reason})")


_Identity = tuple[int, int]


class _Entries(NamedTuple):
    folder: bytes
    images: list[bytes]
    folders: list[bytes]
    identity: _Identity


def _few_of(folders: list[bytes]) -> str:
    return _few([os.fsdecode(name) for name in folders])


def _few(names: list[str]) -> str:
    """The first ten."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _is_image(path: bytes) -> bool:
    return _ends(path, _ENDINGS)


def _ends(path: bytes, endings: tuple[bytes, ...]) -> bool:
    return path.lower().endswith(endings) and not path.startswith(b".")


def _is_folder(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into what may not be read
        return False


def _is_file(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _held_out(files: np.ndarray, fraction: float) -> np.ndarray:
    """(N,) bool: which files of a class are for validation."""
    chosen = np.zeros(len(files), dtype=bool)
    if fraction > 0 and len(files) > 1:
        count = min(max(1, round(fraction * len(files))), len(files) - 1)
        digests = np.array([hashlib.blake2b(file).digest()[:16] for file in files.tolist()])
        chosen[digests.argsort()[:count]] = True
    return chosen


def _image_list(root: Path, classes: dict[str, np.ndarray], names: list[str]) -> ImageList:
    label = {name: number for number, name in enumerate(names)}
    files = np.concatenate([path_array([]), *classes.values()])
    numbers = np.array([label[name] for name in classes], dtype=np.int64)
    return ImageList(root, files, np.repeat(numbers, [len(files) for files in classes.values()]))
