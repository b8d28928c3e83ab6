"""Visual autoregressive modelling by next-focus prediction (FVAR, arXiv 2511.18838)."""

from fvar_lightning.data.modules import ImageDataModule, TokenDataModule
from fvar_lightning.generation.editing import edit
from fvar_lightning.generation.sampling import generate
from fvar_lightning.optics.psf import disk_psf, gaussian_psf
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.official import export_var_checkpoint, load_var_checkpoint
from fvar_lightning.weights.pretrained import from_pretrained, save_pretrained

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
    "edit",
    "export_var_checkpoint",
    "from_pretrained",
    "gaussian_psf",
    "generate",
    "load_var_checkpoint",
    "save_pretrained",
]
