"""Optics: point-spread functions, and the refocused views of an image."""

from fvar_lightning.optics.psf import (
    disk_psf,
    disk_transfer,
    gaussian_psf,
    gaussian_transfer,
    lanczos_psf,
    make_psf,
    polygon_psf,
    transfer_function,
)
from fvar_lightning.optics.refocus import Refocus, Views, decimate

__all__ = [
    "Refocus",
    "Views",
    "decimate",
    "disk_psf",
    "disk_transfer",
    "gaussian_psf",
    "gaussian_transfer",
    "lanczos_psf",
    "make_psf",
    "polygon_psf",
    "transfer_function",
]
