"""Which sample comes when: shuffling by epoch, shares of ranks, and going on in the middle of an epoch."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler


class Draw(NamedTuple):
    """What the training sampler asks of a data set; the sample depends on nothing else."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class EpochSampler(DistributedSampler[Draw]):
    """The share of one rank in the samples of an epoch.

    A `DistributedSampler`, so that Lightning leaves it in place and tells it the epoch.

    Args:
        dataset: anything with a length.
        shuffle: training: shuffled by (seed, epoch), the tail dropped so that all ranks have equally many.
            Otherwise evaluation: every sample exactly once over all ranks, nothing padded, epoch always 0.
        mixed: evaluation in one order that is always the same and mixes the classes, so that a batch, and the first
            batches too, hold images of many. Otherwise in the data set's own.
        seed: of the order of training.
        num_replicas: ranks.
        rank: this rank, from 0.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        shuffle: bool,
        mixed: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=shuffle,
        )
        self.total = len(dataset)
        self.mixed = mixed
        self.start = 0
        """Draws the next pass leaves out at its beginning; the pass sets it back to 0."""

    def __iter__(self) -> Iterator[Draw]:
        start, self.start = self.start, 0
        if self.shuffle:
            return (Draw(self.epoch, i) for i in self.share(self.epoch)[start:])
        order = np.random.default_rng(0).permutation(self.total).tolist() if self.mixed else range(self.total)
        return (Draw(0, i) for i in order[self.rank :: self.num_replicas][start:])

    def share(self, epoch: int) -> list[int]:
        """The samples of this rank in an epoch of training, in order."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.total)
        return order[self.rank :: self.num_replicas][: len(self)].tolist()

    def __len__(self) -> int:
        """Samples of this rank."""
        if self.shuffle:
            return self.total // self.num_replicas
        return len(range(self.rank, self.total, self.num_replicas))


class StreamDraw(NamedTuple):
    """What the training sampler asks of a stream; the sample depends on nothing else."""

    epoch: int
    reader: int
    readers: int
    position: int
    """In what the reader reads."""


class StreamSampler(EpochSampler):
    """The share of one rank in the samples of an epoch of a stream, divided among its workers.

    Every worker is a reader with a share of its own. Batch b comes from worker b modulo `workers`: so does `DataLoader`
    divide them, whatever batch it begins with.

    Args:
        dataset: tells the length of an epoch over all ranks.
        batch_size: samples of a batch.
        workers: of this rank, at least 1.
        num_replicas: ranks.
        rank: this rank, from 0.
    """

    def __init__(self, dataset: Sized, *, batch_size: int, workers: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, shuffle=True, num_replicas=num_replicas, rank=rank)
        self.batch_size = batch_size
        self.workers = workers

    def __iter__(self) -> Iterator[StreamDraw]:  # type: ignore[override]
        start, self.start = self.start, 0
        for number in range(start, len(self)):
            batch, place = divmod(number, self.batch_size)
            turn, worker = divmod(batch, self.workers)
            reader = self.rank * self.workers + worker
            position = turn * self.batch_size + place
            yield StreamDraw(self.epoch, reader, self.num_replicas * self.workers, position)


def even_batch_size(samples: int, num_replicas: int, batch_size: int) -> int:
    """The batch size nearest to `batch_size` (from below if there is one) that gives all ranks equally many batches.

    Ranks that share samples without padding may differ by one sample, and so by one batch; a rank that runs a batch
    more than the others waits for them forever in the first collective call of a DDP or FSDP forward.

    Raises:
        ValueError: if there are fewer samples than ranks.
    """
    if samples < num_replicas:
        raise ValueError(f"{samples} sample(s) cannot be shared by {num_replicas} ranks: every rank needs one")
    fewest, rest = divmod(samples, num_replicas)
    if rest == 0:
        return batch_size
    candidates = itertools.chain(range(batch_size, 1, -1), itertools.count(batch_size + 1))
    return next(size for size in candidates if fewest % size)


class ResumableLoader(DataLoader):
    """A training loader over an `EpochSampler` that goes on in the middle of an epoch without decoding what was seen.

    Lightning keeps `state_dict` in its checkpoints and gives it back. The iterator starts at its first batch, not
    when it is made: Lightning makes it before it tells the sampler the epoch, too early for workers that prefetch.

    Args:
        finished: batches of the running epoch that training has finished. By default those handed out, which are one
            more where a checkpoint is written because a step failed.
        *args, **kwargs: as for `DataLoader`.
    """

    def __init__(self, *args: Any, finished: Callable[[], int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finished = finished
        self.delivered = 0
        self.epoch = 0
        self.resume: dict[str, int] | None = None
        # Lightning counts an epoch twice if a run with max_steps resumes from the end of an epoch
        self.overcount = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        resume, self.resume = self.resume, None
        self.delivered = 0
        # overfit_batches puts another sampler here, which knows no epochs
        if isinstance(sampler, EpochSampler):
            if resume is not None:
                self.overcount = resume["overcount"]
                if sampler.epoch - self.overcount == resume["epoch"]:
                    self.delivered = resume["batches"]
                    sampler.start = self.delivered * (self.batch_size or 1)
                else:  # that epoch was complete, this is the next one
                    self.overcount = sampler.epoch - resume["epoch"] - 1
            self.epoch = sampler.epoch - self.overcount
            sampler.set_epoch(self.epoch)
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def names(self, epoch: int, batch: int) -> list[str]:
        """Where the samples of a batch of an epoch come from; nothing where the sampler or the data set cannot tell."""
        name = getattr(self.dataset, "name", None)
        if name is None or not isinstance(self.sampler, EpochSampler):
            return []
        size = self.batch_size or 1
        return [name(index) for index in self.sampler.share(epoch)[batch * size : (batch + 1) * size]]

    def _shape(self) -> dict[str, int]:
        shape = {"batch_size": self.batch_size or 1, "ranks": getattr(self.sampler, "num_replicas", 1)}
        return shape | ({"workers": self.sampler.workers} if isinstance(self.sampler, StreamSampler) else {})

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches finished in it, and what a batch was."""
        batches = self.delivered if self.finished is None else self.finished()
        return {"epoch": self.epoch, "overcount": self.overcount, "batches": batches, **self._shape()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next pass, if it is over the same epoch, begin after the batches already seen."""
        self.resume = dict(state_dict)
        then = {key: state_dict.get(key) for key in self._shape()}
        if then != self._shape():
            warnings.warn(
                f"the checkpoint was written with {then}, this run has {self._shape()}: until the end of the epoch "
                "some images are seen twice or not at all",
                stacklevel=2,
            )
