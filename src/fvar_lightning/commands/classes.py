"""Classes as people name them."""

from collections.abc import Sequence
from difflib import get_close_matches

SHOWN = 8


def find_label(wanted: str, names: Sequence[str]) -> int:
    """The label of a class given by its name (in any case) or, where no class is called so, by its number.

    Args:
        wanted: name or number.
        names: of all classes, by label.

    Raises:
        ValueError: if there is no such class, naming those that are close, or there are several.
    """
    folded = [name.casefold() for name in names]
    found = [label for label, name in enumerate(names) if name == wanted]
    found = found or [label for label, name in enumerate(folded) if name == wanted.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"class {wanted!r} is what several are called: give a number, {' or '.join(map(str, found))}")
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise ValueError(
        f"class must be a number in 0..{len(names) - 1} or the name of a class, got {wanted!r}; "
        f"{_suggestions(wanted.casefold(), folded, names)}"
    )


def spelled(label: int, names: Sequence[str]) -> str:
    """What `find_label` takes for a label: the name where it is the only one of its kind."""
    return names[label] if list(names).count(names[label]) == 1 else str(label)


def _suggestions(wanted: str, folded: Sequence[str], names: Sequence[str]) -> str:
    within = [label for label, name in enumerate(folded) if wanted and wanted in name]
    similar = [folded.index(name) for name in get_close_matches(wanted, folded, SHOWN)]
    if close := list(dict.fromkeys([*similar, *within]))[:SHOWN]:
        return f"close are {', '.join(f'{names[label]} ({label})' for label in close)}"
    return f"it knows {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
