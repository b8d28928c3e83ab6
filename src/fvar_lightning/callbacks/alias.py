"""AliasMetrics: spectra and latent grid of generated images against real ones."""

from typing import Any

from lightning import Trainer

from fvar_lightning.callbacks.base import StudentEvaluation, num_batches
from fvar_lightning.callbacks.loggers import log_pictures
from fvar_lightning.data.batches import ImageBatch, TokenBatch
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.metrics.alias import decibel
from fvar_lightning.metrics.pictures import line_chart
from fvar_lightning.metrics.spectra import GridArtifact, RadialSpectrumDistance
from fvar_lightning.tasks.fvar import FVARTask


class AliasMetrics(StudentEvaluation):
    """Detail that generated images lack or invent, and the grid their tokens leave, against the loop's real images.

    Logs `RadialSpectrumDistance` as ``val/spectrum/*`` with a picture of both spectra, and `GridArtifact` at the
    harmonics of the patch size as ``val/grid/generated`` and ``val/grid/real``, in dB. About as many real images are
    taken as are generated, spread over the loop.

    Args:
        num_samples, batch_size, base_seed, sampling, weights, every_n_epochs: see `StudentEvaluation`.
    """

    def __init__(self, num_samples: int = 512, **options: Any) -> None:
        super().__init__(num_samples, **options)

    def prepare(self, trainer: Trainer, task: FVARTask, stage: str) -> None:
        """Refuse data without images, and what the metrics refuse of the image size.

        Raises:
            ValueError: saying which.
        """
        if isinstance(trainer.datamodule, TokenDataModule):  # type: ignore[attr-defined]
            raise _no_images(TokenBatch)
        self.begin(trainer, task)

    def begin(self, trainer: Trainer, task: FVARTask) -> None:
        """Metrics without any images."""
        schedule = task.vae.schedule
        self.spectrum = RadialSpectrumDistance(schedule.image_size).to(task.device)
        self.grids = {
            name: GridArtifact(schedule.patch_size, schedule.image_size).to(task.device)
            for name in ("generated", "real")
        }

    def generate(self, trainer: Trainer, task: FVARTask) -> None:
        """Spectra of generated images."""
        for images in self.samples(trainer, task):
            if len(images):
                self.spectrum.update(images, real=False)
                self.grids["generated"].update(images)

    def observe(self, trainer: Trainer, task: FVARTask, batch: Any, batch_idx: int) -> None:
        """Spectra of real images.

        Raises:
            ValueError: for batches without images.
        """
        if not isinstance(batch, ImageBatch):
            raise _no_images(type(batch))
        wanted = max(self.num_samples // (len(batch.images) * trainer.world_size), 1)
        if batch_idx % max(int(num_batches(trainer)[0]) // wanted, 1) == 0:
            self.spectrum.update(batch.images, real=True)
            self.grids["real"].update(batch.images)

    def figures(self, trainer: Trainer, task: FVARTask) -> dict[str, float]:
        """In dB, over all ranks; logs the picture."""
        values = {f"spectrum/{name}": float(value) for name, value in self.spectrum.compute().items()}
        values |= {f"grid/{name}": float(grid.compute()) for name, grid in self.grids.items()}
        log_pictures(trainer, {"spectrum": spectra_picture(self.spectrum, "generated")})
        return values


def _no_images(batch: type) -> ValueError:
    return ValueError(f"AliasMetrics compares with images, but the batches are {batch.__name__}s")


def spectra_picture(metric: RadialSpectrumDistance, name: str) -> Any:
    """Mean power of every ring of the real and of the other images, in dB. All ranks must call it."""
    with metric.sync_context():
        level = decibel(metric.power / metric.count[:, None]).cpu()
    level = level.clamp_min(level[level.isfinite()].min() if level.isfinite().any() else 0.0)
    frequencies = [(k + 1) / metric.image_size for k in range(level.shape[1])]
    pairs = zip(("real", name), level.flip(0).tolist(), strict=True)
    curves = {what: list(zip(frequencies, values, strict=True)) for what, values in pairs}
    return line_chart({"Power, dB": curves}, "cycles per pixel")
