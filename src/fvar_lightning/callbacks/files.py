"""AtomicCheckpointIO: checkpoint files that are there whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from fvar_lightning.atomic import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one it replaces, to the disk, and renames it.

    Lightning's own way collects the file in memory and in the system's temporary folder; from there to another disk it
    is copied over the old checkpoint, and a run that is killed meanwhile has none left. `LastCheckpoint` uses this one;
    other callbacks do with ``Trainer(plugins=AtomicCheckpointIO())``. Addresses (``s3://...``) are written Lightning's
    way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Replace the file, or leave it as it was.

        Raises:
            OSError: if the disk is full or refuses, naming the file.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as beside, open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch reports what it could not write at the end of an archive on top of what the disk refused
            refused = error if isinstance(error, OSError) else error.__context__
            if not isinstance(refused, OSError):
                raise
            before = "; the one that was there is as it was" if Path(path).exists() else ""
            message = f"checkpoint {str(path)!r} could not be written: {refused.strerror}{before}"
            raise OSError(refused.errno, message) from error
