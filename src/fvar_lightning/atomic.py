"""Files that are there whole or not at all, whenever a run is killed."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """Remove what processes killed while `replacing` files of a name (a pattern, as for `Path.glob`) left behind."""
    for beside in Path(folder).glob(f"{name}.*.partial"):
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Indented JSON, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")
