"""ReconstructionMetrics: how near a structure tokenizer's images come to the originals, and what they lose."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from fvar_lightning.callbacks.alias import spectra_picture
from fvar_lightning.callbacks.base import is_last_batch
from fvar_lightning.callbacks.loggers import log_pictures
from fvar_lightning.checks import check_choice
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.metrics.alias import decibel
from fvar_lightning.metrics.extractors import EfficientNetLite0, FeatureExtractor
from fvar_lightning.metrics.generation import frechet_distance
from fvar_lightning.metrics.spectra import GridArtifact, RadialSpectrumDistance
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tasks.training import prefix
from fvar_lightning.tokenizer.lpips import LPIPSNetwork, load_lpips, lpips_file

LPIPS_SIZE = 64
"""Of smaller images too little reaches the networks' last layers, or nothing."""


class ReconstructionMetrics(Callback):
    """Figures of the reconstructions of every validation and test image, under ``val/`` or ``test/``.

    - ``ssim``; ``lpips`` where its network's weights are on this machine (a warning says so where not)
    - ``fd_<extractor>``: Frechet distance of the reconstructions to the originals ("rFID", if it is Inception's)
    - ``focus_psnr/1`` to ``/K``: PSNR of what the tokens up to a focus state decode to, to the image at that state
    - ``high_band``: power in 0.25..0.5 cycles per pixel, reconstructed over original, in dB; negative: detail is lost
    - ``spectrum/*``: `RadialSpectrumDistance`, with a picture; ``grid/*``: `GridArtifact`, both in dB

    PSNR to the sharp image is logged by the task. The networks are no part of the task and in no checkpoint.

    Args:
        extractor: makes the extractor.
        lpips: network of LPIPS, from torch's hub folder; None for none.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self, extractor: Callable[[], FeatureExtractor] = EfficientNetLite0, lpips: LPIPSNetwork | None = "alex"
    ) -> None:
        if lpips is not None:
            check_choice("lpips", lpips, LPIPSNetwork)
        self.make_extractor = extractor
        self.network = lpips
        self.extractor: FeatureExtractor | None = None
        self.lpips: Metric | None = None
        self.metrics: dict[str, Any] = {}
        self.originals: Statistics | None = None
        """The originals are the same in every validation of a run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the networks.

        Raises:
            ValueError: for another task.
        """
        if not isinstance(pl_module, TokenizerTask):
            raise ValueError(f"ReconstructionMetrics needs a TokenizerTask, got {type(pl_module).__name__}")
        self.originals = None
        if self.extractor is None:
            self.extractor = self.make_extractor()
        if self.lpips is None and self.network is not None:
            self.lpips = local_lpips(self.network, pl_module.schedule.image_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin all figures anew."""
        assert isinstance(pl_module, TokenizerTask)
        assert self.extractor is not None
        size, stride = pl_module.schedule.image_size, pl_module.schedule.patch_size
        statistics = functools.partial(
            FeatureStatistics, self.extractor.name, self.extractor.num_features, size, keep_features=False
        )
        self.metrics = {
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            "spectrum": RadialSpectrumDistance(size),
            "grid/reconstructed": GridArtifact(stride, size),
            "grid/original": GridArtifact(stride, size),
            "reconstructed": statistics(),
            "original": statistics(),
        }
        for k in range(pl_module.schedule.focus_states):
            self.metrics[f"focus_psnr/{k + 1}"] = PeakSignalNoiseRatio(data_range=2.0)
        if self.lpips is not None:
            self.lpips.reset()
            self.metrics["lpips"] = self.lpips
        for metric in (*self.metrics.values(), self.extractor):
            metric.to(pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch; behind the last one, log the figures."""
        if trainer.sanity_checking:
            return
        assert self.extractor is not None
        assert isinstance(pl_module, TokenizerTask)
        true, made = batch.images.float(), outputs["decoded"][0].detach().float().clamp(-1, 1)
        self.metrics["ssim"].update((made + 1) / 2, (true + 1) / 2)
        with trainer.precision_plugin.forward_context():
            states = pl_module.reconstruct(batch)
        for k, (decoded, state) in enumerate(zip(states, batch.blurred, strict=True)):
            self.metrics[f"focus_psnr/{k + 1}"].update(decoded.float(), state.float())
        if "lpips" in self.metrics:
            self.metrics["lpips"].update(made, true)
        for images, name in ((made, "reconstructed"), (true, "original")):
            self.metrics["spectrum"].update(images, real=name == "original")
            self.metrics[f"grid/{name}"].update(images)
            if name == "reconstructed" or self.originals is None:
                self.metrics[name].update(self.extractor(to_uint8(images)).features)
        if is_last_batch(trainer, batch_idx, dataloader_idx):
            part = prefix(trainer)
            values = {f"{part}/{name}": value for name, value in self._figures(trainer).items()}
            pl_module.log_dict(values, sync_dist=True, batch_size=1)

    def _figures(self, trainer: Trainer) -> dict[str, float]:
        """Over all ranks."""
        metrics = self.metrics
        spectrum = metrics["spectrum"]
        values = {f"spectrum/{name}": value for name, value in spectrum.compute().items()}
        own = ("ssim", "lpips", "grid/", "focus_psnr/")
        values |= {name: metric.compute() for name, metric in metrics.items() if name.startswith(own)}
        values["high_band"] = high_band_ratio(spectrum)
        made = metrics["reconstructed"].compute()
        if self.originals is None:
            self.originals = metrics["original"].compute()
        values[f"{'fid' if made.extractor == 'inception' else 'fd'}_{made.extractor}"] = frechet_distance(
            made, self.originals
        )
        if made.count <= len(made.mean):
            rank_zero_warn(
                f"{made.count} images for {len(made.mean)} features of {made.extractor}: the Frechet distance of the "
                "reconstructions is strongly biased; compare it with nothing of another number of images"
            )
        log_pictures(trainer, {"spectrum": spectra_picture(spectrum, "reconstructed")})
        return {name: float(value) for name, value in values.items()}

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end


def high_band_ratio(spectrum: RadialSpectrumDistance) -> Tensor:
    """Power in 0.25..0.5 cycles per pixel, generated (or reconstructed) over real, in dB. All ranks must call it.

    The mean power of ring k stands for 2 pi k frequencies.
    """
    with spectrum.sync_context():
        generated, real = spectrum.power / spectrum.count[:, None]
    k = torch.arange(1, len(real) + 1, device=real.device)
    band = k * (k >= spectrum.image_size / 4)
    return decibel((band * generated).sum() / (band * real).sum())


def local_lpips(network: LPIPSNetwork, image_size: int) -> Metric | None:
    """LPIPS if the network's weights need no download; otherwise None and a warning that tells how.

    Raises:
        ValueError: if the file of the weights is truncated or of another network.
    """
    if image_size < LPIPS_SIZE:
        rank_zero_warn(f"LPIPS is off: it needs images of {LPIPS_SIZE} px or more, these have {image_size}")
        return None
    path = lpips_file(network)
    if not path.is_file():
        rank_zero_warn(
            f"LPIPS is off: the weights of {network} are not at {path}. "
            f"Fetch https://download.pytorch.org/models/{path.name} and put it there"
        )
        return None
    return load_lpips(network)
