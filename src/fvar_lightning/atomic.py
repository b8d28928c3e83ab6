"""Files that are there whole or not at all, whenever a run is killed; and what they may be called."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_name(text: str) -> str:
    """The text with an underscore for all that had better not be in a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, beside `path`, which replaces `path` once the block has ended without an error.

    Folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_partial(folder: str | Path, name: str) -> None:
    """Remove what processes killed while replacing files or folders of a name (a pattern, as for `Path.glob`) left
    behind."""
    for beside in Path(folder).glob(f"{name}.*.partial"):
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)


def replace_folder(beside: str | Path, path: str | Path) -> None:
    """Put a folder in the place of another (or of a file), which no rename can do at once: at every moment one of the
    two is there whole, the old one for an instant with ``-before`` at the end of its stem."""
    beside, path = Path(beside), Path(path)
    before = path.with_stem(f"{path.stem}-before")
    if path.exists():
        _remove(before)
        os.rename(path, before)
    os.rename(beside, path)
    _remove(before)


def _remove(path: Path) -> None:
    """Out of sight first: what is half removed is never taken for the whole."""
    if path.exists():
        os.replace(path, path.with_name(f"{path.name}.0.partial"))
        remove_partial(path.parent, path.name)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Indented JSON, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")
