"""What the tables of speed are made of."""

import os
from collections.abc import Callable
from time import process_time

TINY = os.environ.get("FVAR_BENCHMARK") == "tiny"
"""A size of seconds, which means nothing."""


def seconds(run: Callable[[], object]) -> float:
    """Of processor time."""
    start = process_time()
    run()
    return process_time() - start


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(title: str, *columns: str) -> None:
    print(f"\n### {title}\n")
    print_row(*columns)
    print_row(*("---" for _ in columns))
