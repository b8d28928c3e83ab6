"""Visual autoregressive modelling by next-focus prediction (FVAR, arXiv 2511.18838)."""

from fvar_lightning.data.datamodule import ImageDataModule, TokenDataModule
from fvar_lightning.optics.psf import disk_psf, gaussian_psf
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.sampling import generate
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR

__version__ = "0.1.0"

__all__ = [
    "VAR",
    "VQVAE",
    "FVARTask",
    "FocusSchedule",
    "HighFrequencyTeacher",
    "ImageDataModule",
    "Refocus",
    "TokenDataModule",
    "TokenizerTask",
    "disk_psf",
    "gaussian_psf",
    "generate",
]
