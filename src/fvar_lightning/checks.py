"""Refusals that many share: the message names the argument, its value and what is accepted."""

from collections.abc import Mapping
from typing import get_args


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value that is not one of a `Literal`'s.

    Raises:
        ValueError: naming the argument and its value.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


def check_positive(values: Mapping[str, int]) -> None:
    """Refuse numbers below 1, by their names.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_not_negative(values: Mapping[str, float]) -> None:
    """Refuse numbers below 0, and what is none (NaN), by their names.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
