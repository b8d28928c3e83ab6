"""Callbacks: evaluation and pictures in validation and test, writers of what is predicted, checkpoints, averages."""

from fvar_lightning.callbacks.alias import AliasMetrics
from fvar_lightning.callbacks.averaging import DeviceWeightAveraging
from fvar_lightning.callbacks.base import StudentEvaluation
from fvar_lightning.callbacks.checkpoint import LastCheckpoint
from fvar_lightning.callbacks.files import AtomicCheckpointIO
from fvar_lightning.callbacks.generation import GenerationMetrics
from fvar_lightning.callbacks.loggers import log_picture
from fvar_lightning.callbacks.pictures import SamplePictures, TokenizerPictures
from fvar_lightning.callbacks.reconstruction import ReconstructionMetrics
from fvar_lightning.callbacks.teacher_gap import TeacherGap
from fvar_lightning.callbacks.tokens import TokenWriter
from fvar_lightning.callbacks.writers import SampleWriter

__all__ = [
    "AliasMetrics",
    "AtomicCheckpointIO",
    "DeviceWeightAveraging",
    "GenerationMetrics",
    "LastCheckpoint",
    "ReconstructionMetrics",
    "SamplePictures",
    "SampleWriter",
    "StudentEvaluation",
    "TeacherGap",
    "TokenWriter",
    "TokenizerPictures",
    "log_picture",
]
