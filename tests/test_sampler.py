"""Order, shares of ranks, and resuming: runs that die and go on must see what an undisturbed run sees."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fvar_lightning.callbacks.checkpoint import LastCheckpoint
from fvar_lightning.data.loaders import SharedLoaders
from fvar_lightning.data.sampler import Draw, EpochSampler, ResumableLoader, even_batch_size


def test_training_order_depends_on_seed_and_epoch_and_is_shared_without_overlap() -> None:
    def draws(seed: int, epoch: int, ranks: int = 1) -> list[list[Draw]]:
        samplers = [EpochSampler(range(11), shuffle=True, seed=seed, num_replicas=ranks, rank=r) for r in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(list(sampler)) == len(sampler)
        return [list(sampler) for sampler in samplers]

    (first,) = draws(0, 3)
    assert first == draws(0, 3)[0]
    assert sorted(first) == [Draw(3, i) for i in range(11)]
    assert [d.index for d in first] != [d.index for d in draws(0, 4)[0]]
    assert [d.index for d in first] != [d.index for d in draws(1, 3)[0]]
    shares = draws(0, 3, ranks=3)
    assert [len(share) for share in shares] == [3, 3, 3]
    assert len({draw for share in shares for draw in share}) == 9


@pytest.mark.parametrize("mixed", [False, True])
def test_evaluation_over_three_ranks_sees_every_sample_exactly_once(mixed: bool) -> None:
    for total in (3, 7, 10, 11, 12):
        samplers = [
            EpochSampler(range(total), shuffle=False, mixed=mixed, num_replicas=3, rank=rank) for rank in range(3)
        ]
        for sampler in samplers:
            first = list(sampler)
            sampler.set_epoch(5)  # Lightning does; evaluation is the same in every epoch
            assert len(sampler) == len(first)
            assert list(sampler) == first
        assert sorted(itertools.chain(*samplers)) == [Draw(0, i) for i in range(total)]
    order = list(EpochSampler(range(12), shuffle=False, mixed=mixed))
    assert (order == sorted(order)) != mixed


def test_even_batch_size_gives_all_ranks_equally_many_batches() -> None:
    for samples, ranks, batch_size in itertools.product(range(1, 80), range(1, 7), (1, 2, 3, 4, 8, 16)):
        if samples < ranks:
            with pytest.raises(ValueError, match="cannot be shared"):
                even_batch_size(samples, ranks, batch_size)
            continue
        size = even_batch_size(samples, ranks, batch_size)
        batches = {
            len(DataLoader(range(len(range(rank, samples, ranks))), batch_size=size))  # type: ignore[arg-type]
            for rank in range(ranks)
        }
        assert len(batches) == 1
        if samples % ranks == 0:
            assert size == batch_size


def test_start_leaves_out_draws_once() -> None:
    for shuffle in (True, False):
        sampler = EpochSampler(range(10), shuffle=shuffle, num_replicas=2, rank=1)
        whole = list(sampler)
        sampler.start = 2
        assert list(sampler) == whole[2:]
        assert list(sampler) == whole


def test_loader_goes_on_without_reading_what_was_seen() -> None:
    class Recorder(Dataset[int]):
        def __init__(self) -> None:
            self.read: list[int] = []

        def __getitem__(self, draw: Draw) -> int:
            self.read.append(draw.index)
            return draw.index

    def loader(epoch: int) -> tuple[ResumableLoader, Recorder]:
        data = Recorder()
        sampler = EpochSampler(range(10), shuffle=True)
        sampler.set_epoch(epoch)
        return ResumableLoader(data, batch_size=3, sampler=sampler), data

    first, _ = loader(2)
    batches = iter(first)
    head = [next(batches).tolist() for _ in range(2)]
    state = first.state_dict()
    tail = [batch.tolist() for batch in batches]
    second, data = loader(2)
    second.load_state_dict(state)
    assert [batch.tolist() for batch in second] == tail
    assert data.read == list(itertools.chain(*tail))
    assert [batch.tolist() for batch in second] == head + tail, "the next pass is whole again"
    other, data = loader(3)
    other.load_state_dict(state)
    assert len(list(other)) == 4, "a state of an epoch that is over leaves nothing out of the next"
    with pytest.warns(UserWarning, match="batch_size"):
        ResumableLoader(data, batch_size=5, sampler=EpochSampler(range(10), shuffle=True)).load_state_dict(state)


# ---- whole training runs -------------------------------------------------------------------------------------------


class Noise(Dataset[tuple[int, int, Tensor]]):
    """Samples that tell which draw they are."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, draw: Draw) -> tuple[int, int, Tensor]:
        generator = torch.Generator().manual_seed(draw.epoch * 1000 + draw.index)
        return draw.epoch, draw.index, torch.rand(2, generator=generator)


class Data(SharedLoaders):
    def __init__(self, num_workers: int) -> None:
        super().__init__(batch_size=4, num_workers=num_workers, seed=1, samples_per_class=1, base_seed=0)

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(Noise())

    def val_dataloader(self) -> DataLoader:
        return self.eval_loader(Noise())


class Model(LightningModule):
    """One weight whose value depends on every batch and their order."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.die_at = die_at
        self.seen: list[tuple[int, list[int], list[int]]] = []
        self.keys: list[tuple[int, int]] = []
        """Epoch and batch as Lightning counts them, of which the tasks make the keys of their noise."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.die_at:
            raise RuntimeError("killed")
        epochs, indices, values = batch
        self.seen.append((self.global_step, epochs.tolist(), indices.tolist()))
        self.keys.append((self.current_epoch, batch_idx))
        return ((values - self.weight) ** 2).sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def run(model: Model, data: LightningDataModule, limits: dict, callbacks: list[Callback], path: str | None) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, loggers, and checkpoint folders
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            callbacks=callbacks,
            num_sanity_val_steps=0,
            **limits,
        )
        trainer.fit(model, datamodule=data, ckpt_path=path)
    return model


EPOCHS = {"max_epochs": 3}
STEPS = {"max_epochs": -1, "max_steps": 14}
CHECKPOINTS = {
    # 5 steps an epoch: step 7 lies in the second one
    "mid-epoch": {"every_n_train_steps": 7},
    "epoch end": {"every_n_epochs": 2, "save_on_train_epoch_end": True},
    "last step of an epoch": {"every_n_train_steps": 10},
    "after validation": {"every_n_epochs": 2, "save_on_train_epoch_end": False},
    "failing step": {"every_n_train_steps": 100, "save_on_exception": True},
}


@pytest.mark.parametrize(
    ("kind", "num_workers", "limits"),
    [
        *itertools.product(CHECKPOINTS, [0], [EPOCHS, STEPS]),
        ("mid-epoch", 2, EPOCHS),
        ("epoch end", 2, EPOCHS),
        ("after validation", 2, EPOCHS),
    ],
)
def test_killed_and_resumed_run_sees_the_same_batches(
    tmp_path: Path, kind: str, num_workers: int, limits: dict
) -> None:
    whole = run(Model(), Data(num_workers), limits, [], None)
    assert len(whole.seen) == (15 if limits is EPOCHS else 14)
    assert {epoch for _, epochs, _ in whole.seen for epoch in epochs} == {0, 1, 2}

    checkpoint = ModelCheckpoint(tmp_path, filename="it", **CHECKPOINTS[kind])
    with pytest.raises(RuntimeError, match="killed"):
        run(Model(die_at=12), Data(num_workers), limits, [checkpoint], None)
    (path,) = tmp_path.glob("*.ckpt")
    step = torch.load(path, weights_only=True)["global_step"]
    assert step == {"mid-epoch": 7, "failing step": 12}.get(kind, 10)

    resumed = run(Model(), Data(num_workers), limits, [], str(path))
    assert resumed.seen == whole.seen[step:]
    assert resumed.keys == whole.keys[step:]
    assert torch.equal(resumed.weight, whole.weight)


class Stop(Callback):
    """Ends a run at step 7, which lies in the second epoch: as `max_time` does, or as early stopping."""

    def __init__(self, in_validation: bool) -> None:
        self.in_validation = in_validation

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 7 and not self.in_validation:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 7:
            trainer.should_stop = True


@pytest.mark.parametrize("interval", [2, 4, 5, None], ids="validated every {}".format)
@pytest.mark.parametrize("every_n_train_steps", [4, 5, 1000], ids="saved every {}".format)
def test_a_run_that_ended_with_an_epoch_goes_on_with_the_next(
    tmp_path: Path, interval: int | None, every_n_train_steps: int
) -> None:
    """Wherever in an epoch of five steps it validates: Lightning, which counts epochs and batches, is to count on."""
    options = {} if interval is None else {"val_check_interval": interval}
    whole = run(Model(), Data(0), STEPS | options, [], None)
    checkpoint = LastCheckpoint(str(tmp_path), every_n_train_steps)
    run(Model(), Data(0), STEPS | options | {"max_steps": 10}, [checkpoint], None)
    resumed = run(Model(), Data(0), STEPS | options, [], str(tmp_path / "last.ckpt"))
    assert resumed.seen == whole.seen[10:]
    assert resumed.keys == whole.keys[10:]
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("limits", [EPOCHS, STEPS], ids=["epochs", "steps"])
@pytest.mark.parametrize("ending", ["max_steps", "step", "validation"])
def test_a_run_that_ended_within_an_epoch_goes_on_there(tmp_path: Path, ending: str, limits: dict) -> None:
    whole = run(Model(), Data(0), limits, [], None)
    first, stops = (STEPS | {"max_steps": 7}, []) if ending == "max_steps" else (limits, [Stop(ending == "validation")])
    if ending == "validation":
        first = first | {"val_check_interval": 7, "check_val_every_n_epoch": None}
    run(Model(), Data(0), first, [*stops, LastCheckpoint(str(tmp_path))], None)
    path = tmp_path / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 7
    resumed = run(Model(), Data(0), limits, [], str(path))
    assert resumed.seen == whole.seen[7:]
    assert resumed.keys == whole.keys[7:]
    assert torch.equal(resumed.weight, whole.weight)


def test_run_resumed_twice_sees_the_same_batches(tmp_path: Path) -> None:
    # From the end of an epoch with max_steps, where Lightning counts one epoch too many, then from within one
    limits = {"max_epochs": -1, "max_steps": 20}
    whole = run(Model(), Data(0), limits, [], None)
    path = None
    epoch_end = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    for folder, die_at, options in (("a", 7, epoch_end), ("b", 18, {"every_n_train_steps": 13})):
        with pytest.raises(RuntimeError, match="killed"):
            run(Model(die_at), Data(0), limits, [ModelCheckpoint(tmp_path / folder, **options)], path)
        (path,) = map(str, (tmp_path / folder).glob("*.ckpt"))
    resumed = run(Model(), Data(0), limits, [], path)
    assert resumed.seen == whole.seen[13:]
    assert torch.equal(resumed.weight, whole.weight)
