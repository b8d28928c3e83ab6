"""Which tokens a task of stage 2 makes, and whether a cache holds the same."""

from collections.abc import Mapping
from dataclasses import asdict, replace

from fvar_lightning.data.token_cache import TokenCache
from fvar_lightning.data.tokens import TokenizerIdentity, TokenMeta, disagreements
from fvar_lightning.tokenizer.build import Tokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.weights.identity import tokenizer_sha256


def hashes(tokenizers: Mapping[str, Tokenizer | None]) -> dict[str, str]:
    """`tokenizer_sha256` of those that there are."""
    return {name: tokenizer_sha256(x) for name, x in tokenizers.items() if x is not None}


def identity(tokenizer: Tokenizer, sha256: str) -> TokenizerIdentity:
    """Of a tokenizer with weights of that hash."""
    targets = tokenizer.targets if isinstance(tokenizer, VQVAE) else None
    return TokenizerIdentity(tokenizer.vocab_size, sha256, tokenizer.psf, targets)


def check_cache(cache: TokenCache, own: TokenMeta) -> None:
    """Refuse a cache of other tokens than a task's own; alias tokens that no teacher reads may be of any.

    Raises:
        ValueError: with what both are.
    """
    held = cache.tokens if own.alias else replace(cache.tokens, alias=None)
    found, wanted = asdict(replace(held, class_names=own.class_names)), asdict(own)
    if differing := disagreements(found, wanted):
        raise ValueError(
            f"the token cache {str(cache.folder)!r} was written with {differing}, as the task's tokenizers would: "
            "write it again with these, or give the task those"
        )
