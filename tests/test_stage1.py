"""The step of stage 1: accumulated, compiled, and that it does not wait for the device."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch._dynamo.utils import counters

from distributed_worker import FixedImages, make_task, make_trainer
from waits import Waits

STEPS = 6
EVERYTHING = {"noise": (0.1, 0.1), "scale_dropout": 0.5, "adversarial_weight": 0.5, "adversarial_start": 0.0}


class Validated(FixedImages):
    val_dataloader = FixedImages.train_dataloader


def trained(
    name: str, passes: int, folder: Path, callbacks: list[Callback] | None = None, steps: int = STEPS, **options: Any
) -> dict[str, torch.Tensor]:
    """Weights after a few steps of eight images each."""
    task = make_task(name, [], **options)
    trainer = Trainer(
        accelerator="cpu", devices=1, precision="64-true", max_steps=steps, accumulate_grad_batches=passes,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(task, FixedImages(passes))
    return task.state_dict()


def test_accumulated_passes_are_one_step_of_the_codebook(tmp_path: Path) -> None:
    """Warm-up, k-means, moving averages and revival: two half batches a step reach what whole batches reach."""
    whole, halves = (trained("structure", passes, tmp_path) for passes in (1, 2))
    assert whole["tokenizer.quantizer.codebook.updates"] == STEPS
    for key, value in whole.items():
        torch.testing.assert_close(halves[key], value, atol=1e-9, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_the_alias_tokenizers_clock_counts_steps_too(tmp_path: Path) -> None:
    assert trained("alias", 2, tmp_path)["tokenizer.codebook.updates"] == STEPS


@pytest.mark.parametrize("name", ["structure", "alias"])
def test_a_tokenizer_may_be_validated_before_it_is_trained_and_after(name: str, tmp_path: Path) -> None:
    """As in a notebook: Lightning validates in inference mode, whose tensors nothing else may add to."""
    task, data = make_task(name, []), Validated()
    trainer = make_trainer("auto", "32-true", 1, 1, tmp_path)
    found = [trainer.validate(task, data, verbose=False)[0]["val/usage/all"]]
    trainer.fit(task, data)
    found.append(float(trainer.callback_metrics["val/usage/all"]))
    found.append(trainer.validate(task, data, verbose=False)[0]["val/usage/all"])
    assert found[2] == found[1] != found[0]


class SteadySteps(Callback):
    """Counts in whole steps, optimiser and logging included, once the codes are set."""

    def __init__(self) -> None:
        self.waits, self.steps = Waits(), 0

    def on_train_batch_start(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if not task.tokenizer.codebook.warming_up:
            self.steps += 1
            self.waits.__enter__()

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if self.steps:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize(("name", "options"), [("structure", EVERYTHING), ("alias", {})])
def test_a_steady_step_does_not_wait_for_the_device(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    counted = SteadySteps()
    with counted.waits:
        torch.arange(2)[torch.tensor([True, False])].item()
    assert counted.waits.found == {"lift_fresh": 1, "index.Tensor": 1, "_local_scalar_dense": 1}
    counted.waits.found.clear()
    trained(name, 1, tmp_path, [counted], **options)
    assert counted.steps == STEPS - 2
    assert counted.waits.found == {}


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param("structure", EVERYTHING, marks=pytest.mark.slow), ("alias", {})]
)
def test_compiled_tokenizers_train_alike(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantising and reviving included, without a graph break in encoder and decoder."""
    expected = trained(name, 1, tmp_path, steps=3, **options)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    torch._dynamo.reset()
    counters.clear()
    found = trained(name, 1, tmp_path, steps=3, compile=True, **options)
    assert counters["stats"]["unique_graphs"] > 1
    assert not counters["graph_break"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-9, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
