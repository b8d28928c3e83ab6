"""What both data modules share: loaders that divide data among ranks and resume in the middle of an epoch."""

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from fvar_lightning.data.batches import SampleBatch
from fvar_lightning.data.sampler import Draw, EpochSampler, ResumableLoader, StreamSampler, even_batch_size
from fvar_lightning.data.streams import HFStream


class SampleRequests(Dataset[SampleBatch]):
    """Images to generate: `per_class` of every class, class by class, seeds `base_seed` + position.

    Args:
        num_classes: of the labels.
        per_class: images of every class.
        base_seed: seed of the first.
        finished: seeds of images that are there already, and are left out.
        together: so many consecutive images, those that all ranks generate in one step, are left out only together:
            what is generated again is then generated in the same batch, and comes out the same to the last bit.
    """

    def __init__(
        self, num_classes: int, per_class: int, base_seed: int, finished: Collection[int] = (), together: int = 1
    ) -> None:
        self.per_class = per_class
        self.base_seed = base_seed
        done = frozenset(finished)
        everything = range(num_classes * per_class)
        steps = (everything[start : start + together] for start in range(0, len(everything), together))
        self.positions = [p for step in steps if any(base_seed + p not in done for p in step) for p in step]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int | Draw) -> SampleBatch:
        position = self.positions[item.index if isinstance(item, Draw) else item]
        return SampleBatch(torch.tensor(position // self.per_class), torch.tensor(self.base_seed + position))


class Passes(Dataset[Any]):
    """Several epochs of a data set one after the other, as one data set; its first `start` samples may be left out."""

    def __init__(self, dataset: Dataset[Any], length: int, passes: int) -> None:
        self.dataset = dataset
        self.length = length
        self.passes = passes
        self.start = 0

    def __len__(self) -> int:
        return self.length * self.passes - self.start

    def __getitem__(self, item: int | Draw) -> Any:
        index = item.index if isinstance(item, Draw) else item
        return self.dataset[Draw(*divmod(self.start + index, self.length))]


class SharedLoaders(LightningDataModule):
    """Loaders that share data among ranks, resume in the middle of an epoch and ask for images to generate.

    Args: see `ImageDataModule`.
    """

    def __init__(
        self, batch_size: int, num_workers: int | None, seed: int, samples_per_class: int, base_seed: int
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers or 0, 0),
            ("seed", seed, 0),
            ("samples_per_class", samples_per_class, 1),
            ("base_seed", base_seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.samples_per_class = samples_per_class
        self.base_seed = base_seed
        self.finished_seeds: Callable[[], Collection[int]] = tuple
        """Seeds of images that `predict` leaves out: those there already (`SampleWriter` knows, once weights are
        loaded)."""
        self.finished_rows: Callable[[int, int], int] | None = None
        """Of so many rows of a token cache in batches of this size, how many `predict` leaves out, whole steps of all
        ranks: those there already (`TokenWriter` knows, once weights are loaded)."""

    @property
    def class_names(self) -> list[str]:
        """Name of every label."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def _for_gpu(self) -> bool:
        """Whether batches go to a GPU; without a trainer, whether they could."""
        if self.trainer is None:
            return torch.cuda.is_available()
        return self.trainer.strategy.root_device.type == "cuda"

    def _options(self, collate: Callable | None) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            devices = self.trainer.num_devices if self.trainer is not None else 1
            # SLURM binds every task to cores of its own, which are not to be divided once more
            own = int(os.environ.get("SLURM_CPUS_PER_TASK", usable // devices))
            # Without a GPU the cores are needed for training itself
            workers = min(8, min(own, usable) - 1) if self._for_gpu else (2 if usable > 4 else 0)
            workers = max(0, workers)
        return {"num_workers": workers, "collate_fn": collate, "pin_memory": self._for_gpu}

    @property
    def _ranks(self) -> dict[str, Any]:
        if self.trainer is None:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def train_loader(self, dataset: Any, collate: Callable | None = None) -> DataLoader:
        """Shuffled batches; an incomplete last one is dropped unless it is the only one."""
        options = self._options(collate)
        sampler: EpochSampler
        if isinstance(dataset, HFStream):
            workers = max(1, options["num_workers"])
            sampler = StreamSampler(dataset, batch_size=self.batch_size, workers=workers, **self._ranks)
        else:
            sampler = EpochSampler(dataset, shuffle=True, seed=self.seed, **self._ranks)
        if len(sampler) == 0:
            raise ValueError(f"{len(dataset)} training sample(s) cannot be shared by {sampler.num_replicas} ranks")
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            persistent_workers=options["num_workers"] > 0,
            finished=self._finished_batches if self.trainer is not None else None,
            **options,
        )

    def _finished_batches(self) -> int:
        assert self.trainer is not None
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return current.processed

    def eval_loader(self, dataset: Any, collate: Callable | None = None) -> DataLoader:
        """Every sample once over all ranks, equally many batches on every rank; in an order that is always the same and
        mixes the classes: `limit_val_batches` leaves some of each, and batches hold more than one."""
        size = even_batch_size(len(dataset), self._ranks["num_replicas"], self.batch_size)
        return self._evaluation(dataset, size, collate, mixed=True)

    def unfinished_loader(self, rows: Passes) -> DataLoader | list[DataLoader]:
        """The rows in order, less those finished; no loader if none are left. A batch holds the same rows whatever is
        finished."""
        size = even_batch_size(len(rows), self._ranks["num_replicas"], self.batch_size)
        rows.start = 0 if self.finished_rows is None else self.finished_rows(len(rows), size)
        return self._evaluation(rows, size) if len(rows) else []

    def _evaluation(
        self, dataset: Any, batch_size: int, collate: Callable | None = None, *, mixed: bool = False
    ) -> DataLoader:
        sampler = EpochSampler(dataset, shuffle=False, mixed=mixed, **self._ranks)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **self._options(collate))

    def sample_loader(self) -> DataLoader | list[DataLoader]:
        """`SampleBatch`es: `samples_per_class` of every class, less those finished; no loader if none are left.

        The classes are the task's where it knows them: generating needs no data. A batch holds the same images whatever
        is finished.
        """
        task = None if self.trainer is None else self.trainer.lightning_module
        classes = getattr(task, "num_classes", None) or self.num_classes
        ranks = self._ranks["num_replicas"]
        size = even_batch_size(classes * self.samples_per_class, ranks, self.batch_size)
        requests = SampleRequests(
            classes,
            self.samples_per_class,
            self.base_seed,
            finished=self.finished_seeds(),
            together=size * ranks,
        )
        return self._evaluation(requests, size) if len(requests) else []
