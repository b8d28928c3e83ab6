"""Build a tokenizer from the plain description a checkpoint keeps."""

from typing import Any, Literal, get_args

from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE

Kind = Literal["structure", "alias"]
Tokenizer = VQVAE | AliasTokenizer


def build_tokenizer(kind: Kind, schedule: FocusSchedule | dict[str, Any], **config: Any) -> Tokenizer:
    """A `VQVAE` (structure) or an `AliasTokenizer` (alias) with the arguments `config`.

    Raises:
        ValueError: if `kind` is neither.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be 'structure' or 'alias', got {kind!r}")
    network = VQVAE if kind == "structure" else AliasTokenizer
    return network(FocusSchedule.of(schedule), **config)
