"""GenerationMetrics: the field's figures of generated images, against real ones."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from fvar_lightning.atomic import write_json
from fvar_lightning.callbacks.base import StudentEvaluation, identify_weights
from fvar_lightning.callbacks.real import (
    Part,
    load_reference,
    on,
    real_images,
    real_statistics,
    with_features,
)
from fvar_lightning.checks import check_choice
from fvar_lightning.data.listings import user_cache
from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.metrics.extractors import EfficientNetLite0, FeatureExtractor
from fvar_lightning.metrics.generation import Figures, generation_figures
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.weights.averages import Weights
from fvar_lightning.weights.identity import versions


class GenerationMetrics(StudentEvaluation):
    """Frechet and kernel distance, Inception Score, precision and recall of generated images, in validation and test.

    Every image passes the extractor once, every image of every rank counts once. The figures are logged as
    ``val/fd_<extractor>`` and so on (see `generation_figures`), or under ``test/``; in a test they also go into a JSON
    file, with settings, versions and the checkpoint's hash. The extractor is no part of the task and in no checkpoint.

    Args:
        num_samples: images to generate; 50 000 in the literature, 50 of each class.
        extractor: makes the extractor: `EfficientNetLite0` (offline), `Inception`, or one of your own.
        real: part of the data module's images to compare with. Its statistics are computed once and kept in `cache`.
        reference: file to compare with instead: of `Statistics.save`, or a reference batch of the ADM suite.
        cache: folder of statistics; by default ``fvar-lightning`` in the user's cache folder.
        report: path of the JSON file; by default ``generation_<extractor>.json`` in the logger's folder.
        batch_size, base_seed, sampling, weights, every_n_epochs: see `StudentEvaluation`.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        num_samples: int = 5000,
        extractor: Callable[[], FeatureExtractor] = EfficientNetLite0,
        real: Part = "train",
        reference: str | None = None,
        cache: str | None = None,
        report: str | None = None,
        batch_size: int | None = None,
        base_seed: int = 0,
        sampling: dict[str, Any] | None = None,
        weights: Weights = "ema",
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(num_samples, batch_size, base_seed, sampling, weights, every_n_epochs)
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        check_choice("real", real, Part)
        self.make_extractor = extractor
        self.extractor: FeatureExtractor | None = None
        self.real, self.reference = real, reference
        self.cache = user_cache() if cache is None else Path(cache)
        self.report = report
        self.real_statistics: Statistics | None = None
        """On rank 0, once they were needed."""
        self.real_name: str | None = None
        self.generated: Statistics | None = None
        self.seconds: dict[str, float] = {}

    def prepare(self, trainer: Trainer, task: FVARTask, stage: str) -> None:
        """Refuse data without real images, unless there is a reference, which is read; make the extractor."""
        if self.reference is None:
            real_images(trainer, self.real)
        self.real_name = self.real_statistics = None  # of an earlier run, with other images
        if self.extractor is None:
            self.extractor = self.make_extractor()
        if self.reference is not None:
            size = task.vae.schedule.image_size
            self.real_statistics = load_reference(self.reference, self.extractor, size)

    def generate(self, trainer: Trainer, task: FVARTask) -> None:
        """Statistics of the generated images of all ranks."""
        assert self.extractor is not None
        extractor, start = self.extractor.to(task.device), time.perf_counter()
        size = task.vae.schedule.image_size
        metric = FeatureStatistics(extractor.name, extractor.num_features, size).to(task.device)
        for images in self.samples(trainer, task):
            if len(images):
                metric.update(*extractor(to_uint8(images)))
        if not metric.update_called:  # a rank without images has something to gather all the same
            features, logits = extractor(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=task.device))
            metric.update(features[:0], None if logits is None else logits[:0])
        self.generated = metric.compute()
        self.seconds = {"generation": time.perf_counter() - start}

    def figures(self, trainer: Trainer, task: FVARTask) -> dict[str, float]:
        """Computed by rank 0, told to all."""
        assert self.extractor is not None
        assert self.generated is not None
        start = time.perf_counter()
        if self.real_name is None:
            self._find_real(trainer, self.extractor, task.device)
        self.seconds["real images"] = time.perf_counter() - start
        figures = None
        if trainer.is_global_zero:
            assert self.real_statistics is not None
            start = time.perf_counter()
            figures = generation_figures(self.generated, on(self.real_statistics, task.device))
            self.seconds["figures"] = time.perf_counter() - start
            for message in figures.warnings:
                rank_zero_warn(message)
        figures = trainer.strategy.broadcast(figures)
        assert figures is not None
        if trainer.testing:
            self._write_report(trainer, task, figures)
        self.generated = None
        return figures.values

    def _find_real(self, trainer: Trainer, extractor: FeatureExtractor, device: torch.device) -> None:
        if self.reference is None:
            found = real_statistics(trainer, extractor, device, self.real, self.cache)
            self.real_statistics, self.real_name = found
        else:
            self.real_name = self.reference
            if trainer.is_global_zero:
                assert self.real_statistics is not None
                self.real_statistics = with_features(self.real_statistics, self.reference, extractor, device)

    def _write_report(self, trainer: Trainer, task: FVARTask, figures: Figures) -> None:
        assert self.extractor is not None
        # these two ask all ranks
        checkpoint = identify_weights(trainer, task)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        assert self.real_statistics is not None
        path = Path(self.report) if self.report is not None else folder / f"generation_{self.extractor.name}.json"
        content = asdict(figures) | {
            "settings": {
                "samples": self.num_samples,
                "classes": task.student.num_classes,
                "samples_per_class": self.num_samples / task.student.num_classes,
                "base_seed": self.base_seed,
                "sampling": task.sampling | self.sampling,
                "weights": self.weights,
                "precision": str(trainer.precision),
                "extractor": self.extractor.name,
                "features": self.extractor.num_features,
                "real": self.real_name,
                "real_images": self.real_statistics.count,
                "image_size": task.vae.schedule.image_size,
                "ranks": trainer.world_size,
            },
            "checkpoint": checkpoint,
            "versions": versions(),
            "seconds": self.seconds,
        }
        write_json(path, content)
        rank_zero_info(f"figures written to {path}")
