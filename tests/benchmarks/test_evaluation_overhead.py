"""What evaluation costs beside generating the images and passing them through the extractor; run with -m benchmark -s.

The student is the size of the quickstart's (64 px, depth 8, width 192), random. Real images are cached before. On one
pinned Xeon core: 512 images 4.2 % of the generation's 21.5 s, 2000 images 2.0 % of 78.6 s, alias figures 2 %.
"""

from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from size import TINY
from torch import Tensor
from torch.nn import functional as F

from evaluation_worker import make_trainer
from fvar_lightning.callbacks import AliasMetrics, GenerationMetrics
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.metrics.extractors import FeatureExtractor, Features
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tokenizer.build import build_tokenizer

BATCH = 8 if TINY else 32
LAYOUT = {"patch_nums": (1, 2, 3, 4, 6, 8), "patch_size": 8, "focus_states": 4, "max_radius": 5.0, "schedule": "cosine"}


def make_task(root: Path) -> FVARTask:
    description = {"kind": "structure", "schedule": LAYOUT, "vocab_size": 512, "z_channels": 16, "ch": 16,
                   "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1}  # fmt: skip
    tokenizer = build_tokenizer(**description)
    tokenizer.codebook.step()  # a tokenizer without codes is refused
    weights = {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}
    torch.save({"tokenizer": description, "state_dict": weights}, root / "structure.ckpt")
    return FVARTask(str(root / "structure.ckpt"), num_classes=8, depth=8, width=192, heads=6, teacher_loss_weight=0.0,
                    feature_weight=0.0, logit_weight=0.0).eval()  # fmt: skip


class Projection(FeatureExtractor):
    """As many features and logits as EfficientNet-Lite0, at no cost: an extractor's own time does not count here."""

    def __init__(self) -> None:
        super().__init__("projection", 1280)
        self.weight = torch.randn(3 * 32 * 32, 1280, generator=torch.Generator().manual_seed(0))

    def extract(self, images: Tensor) -> Features:
        features = torch.relu(F.avg_pool2d(images.float() / 255, 2).flatten(1) @ self.weight)
        return Features(features, features[:, :1000])


class Clock:
    """Adds up the processor time of calls; one thread, so that a busy machine does not count."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = process_time()
        result = self.function(*args, **kwargs)
        self.seconds += process_time() - start
        return result


@pytest.mark.benchmark
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("samples", [16] if TINY else [512, 2000])
def test_overhead_of_generation_metrics(samples: int, tmp_path: Path) -> None:
    data = ImageDataModule(
        image_size=64, schedule=FocusSchedule(**LAYOUT), crops_per_photograph=4 if TINY else 128, num_workers=0
    )
    cache = str(tmp_path / "cache")
    trainer = make_trainer(tmp_path, [GenerationMetrics(2, Projection, cache=cache)], limit_val_batches=1, logger=False)
    trainer.validate(make_task(tmp_path), data, verbose=False)

    metrics = GenerationMetrics(samples, Projection, cache=cache, batch_size=BATCH)
    metrics.extractor = Projection()
    alias = AliasMetrics(BATCH, batch_size=BATCH)
    task = make_task(tmp_path)
    task.generate = generation = Clock(task.generate)  # type: ignore[method-assign]
    extractor = Clock(metrics.extractor.extract)
    metrics.extractor.extract = extractor
    parts = {}
    for callback in (metrics, alias):
        generation.seconds = extractor.seconds = 0.0
        callback.generate, callback.figures = (Clock(f) for f in (callback.generate, callback.figures))
        trainer = make_trainer(tmp_path, [callback], limit_val_batches=1, logger=False)
        trainer.validate(task, data, verbose=False)
        whole = callback.generate.seconds + callback.figures.seconds
        beyond = whole - generation.seconds - extractor.seconds
        parts[type(callback).__name__] = beyond / generation.seconds
        print(
            f"\n{type(callback).__name__}, {callback.num_samples} images: generation {generation.seconds:.1f} s, "
            f"extractor {extractor.seconds:.1f} s, beyond {beyond:.2f} s = {parts[type(callback).__name__]:.1%} of "
            f"generation, of which figures {callback.figures.seconds:.2f} s"
        )
    assert TINY or max(parts.values()) < 0.1
