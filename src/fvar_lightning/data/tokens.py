"""TokenMeta: what the tokens of a cache are, which tokenizers made them, and how a row holds them.

Legend: B batch, L tokens in all scales together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.schedule import FocusSchedule

_LIMIT = 2**16


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made tokens.

    Args:
        vocab_size: entries of its codebook.
        sha256: of its weights, as far as tokens depend on them.
        psf: point-spread function of the views it encodes; None if it encodes none.
        targets: of a structure tokenizer, see `VQVAE`.

    Raises:
        ValueError: if its tokens do not fit into 16 bits.
    """

    vocab_size: int
    sha256: str
    psf: str | None
    targets: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= _LIMIT:
            raise ValueError(f"vocab_size must lie in 1..{_LIMIT}, got {self.vocab_size}")


@dataclass(frozen=True)
class TokenMeta:
    """What tokens depend on beside the images, and the names of the labels.

    Args:
        schedule: of the views.
        class_names: name of every label.
        structure: the tokenizer of the structure tokens.
        alias: the tokenizer of the alias tokens; None if there are none.
        alias_deviations: by which it divides the residuals of every scale; its weights tell them only for the image
            size that it was trained at.
    """

    schedule: FocusSchedule
    class_names: list[str]
    structure: TokenizerIdentity
    alias: TokenizerIdentity | None = None
    alias_deviations: list[float] | None = field(default=None, compare=False)  # see `with_deviations`

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "TokenMeta":
        """From the plain dictionary that `asdict` makes.

        Raises:
            KeyError, TypeError, ValueError: if it is of something else.
        """
        structure, alias = (content[part] and TokenizerIdentity(**content[part]) for part in ("structure", "alias"))
        schedule, names, deviations = content["schedule"], content["class_names"], content.get("alias_deviations")
        return cls(FocusSchedule.of(schedule), names, structure, alias, deviations)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every scale."""
        return [n * n for n in self.schedule.patch_nums]

    @property
    def dtype(self) -> np.dtype:
        """Of a row: structure (L,) uint16, alias (L,) uint16 where there are alias tokens, label int64."""
        length = (self.schedule.length,)
        alias = [("alias", "<u2", length)] if self.alias else []
        return np.dtype([("structure", "<u2", length), *alias, ("label", "<i8")])

    def rows(self, batch: TokenBatch) -> np.ndarray:
        """(B,) rows of a batch.

        Raises:
            ValueError: if tokens are missing or too many, or do not fit.
        """
        rows = np.empty(len(batch.labels), self.dtype)
        rows["label"] = batch.labels.cpu().numpy()
        for part, maps in [("structure", batch.structure)] + ([("alias", batch.alias)] if self.alias else []):
            if not maps:
                raise ValueError(f"{part} tokens are missing from the batch")
            tokens = torch.cat(list(maps), dim=1).cpu()
            _check(part, tokens, rows[part].shape)
            rows[part] = tokens.numpy()
        return rows


def with_deviations(meta: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A plain `TokenMeta` with another's deviations of the residuals, where its own are the same but for rounding
    (bf16's at most): they depend on how many images were measured together, and in which precision."""
    own, theirs = meta.get("alias_deviations"), other.get("alias_deviations")
    alike = own and theirs and len(own) == len(theirs) and np.allclose(own, theirs, rtol=1e-2)
    return meta | {"alias_deviations": theirs} if alike else meta


def _check(part: str, tokens: Tensor, shape: tuple[int, ...]) -> None:
    if tokens.shape != shape:
        raise ValueError(f"{part} must measure {shape}, got {tuple(tokens.shape)}")
    if tokens.numel() and not (tokens.min() >= 0 and tokens.max() < _LIMIT):
        raise ValueError(f"{part} must lie in 0..{_LIMIT - 1}, got {int(tokens.min())}..{int(tokens.max())}")


def disagreements(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between nested dictionaries, for a message: "layout.ranks 1 instead of 2"; empty if nothing."""
    theirs, ours = _flat(found), _flat(wanted)
    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    return "; ".join(f"{name} {_brief(theirs.get(name))} instead of {_brief(ours.get(name))}" for name in names)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
