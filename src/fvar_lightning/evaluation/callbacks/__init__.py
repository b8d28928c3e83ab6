"""Callbacks that evaluate while Lightning validates and tests."""

from fvar_lightning.evaluation.callbacks.alias import AliasMetrics
from fvar_lightning.evaluation.callbacks.base import StudentEvaluation
from fvar_lightning.evaluation.callbacks.generation import GenerationMetrics
from fvar_lightning.evaluation.callbacks.loggers import log_picture
from fvar_lightning.evaluation.callbacks.pictures import SamplePictures, TokenizerPictures
from fvar_lightning.evaluation.callbacks.reconstruction import ReconstructionMetrics

__all__ = [
    "AliasMetrics",
    "GenerationMetrics",
    "ReconstructionMetrics",
    "SamplePictures",
    "StudentEvaluation",
    "TokenizerPictures",
    "log_picture",
]
