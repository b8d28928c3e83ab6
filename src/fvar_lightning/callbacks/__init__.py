"""Callbacks that evaluate while Lightning validates and tests."""

from fvar_lightning.callbacks.alias import AliasMetrics
from fvar_lightning.callbacks.base import StudentEvaluation
from fvar_lightning.callbacks.generation import GenerationMetrics
from fvar_lightning.callbacks.loggers import log_picture
from fvar_lightning.callbacks.pictures import SamplePictures, TokenizerPictures
from fvar_lightning.callbacks.reconstruction import ReconstructionMetrics

__all__ = [
    "AliasMetrics",
    "GenerationMetrics",
    "ReconstructionMetrics",
    "SamplePictures",
    "StudentEvaluation",
    "TokenizerPictures",
    "log_picture",
]
