"""Codebook: nearest-code look-up and the upkeep that keeps every code in use.

Legend: N vectors, V codes, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fvar_lightning.precision import no_autocast

KMEANS_ITERATIONS = 10
POOL = 32
"""Vectors of the pool that initialises the codes, for each of them, where there are so many."""
ROWS = 2**14
"""Vectors of the pool whose distances to the codes are in memory at once."""
FADED = 1e-5
"""Moving average of a code's uses below which it no longer moves."""


def _place() -> tuple[int, int]:
    """Which process this is, and of how many."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _joined(x: Tensor) -> Tensor:
    """Rows of all processes, in rank order. Every process must hold the same number."""
    _, processes = _place()
    if processes == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(processes)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _summed(*tables: Tensor) -> Sequence[Tensor]:
    """Sums over all processes of tables of equal height, in one exchange."""
    if _place()[1] == 1:
        return tables
    joined = torch.cat(tables, dim=1)
    distributed.all_reduce(joined)
    return joined.split([table.shape[1] for table in tables], dim=1)


def _forget_clock(codebook: "Codebook", _: object) -> None:
    """Loading has set another one."""
    codebook._clock = None


def _distinct_first(rows: Tensor) -> Tensor:
    """Indices of the rows, those last that repeat an earlier one (to a millionth of the largest value): of equal codes
    rounding would decide which is nearest."""
    keys = (rows / rows.abs().max().clamp_min(1e-30) * 1e6).round()
    groups = torch.unique(keys, dim=0, return_inverse=True)[1]
    places = torch.arange(len(rows), device=rows.device)
    first = places.new_full((len(rows),), len(rows)).scatter_reduce(0, groups, places, "amin")
    return (first[groups] != places).to(torch.uint8).argsort(stable=True)


def exact(z: Tensor) -> Tensor:
    """At least float32: half-precision features would choose other codes."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


class Codebook(nn.Module):
    """V vectors that follow the data by exponential moving averages (VQ-VAE, appendix A.1).

    Passes in training mode `collect` what they saw; `step`, called once for every step of the optimiser, however many
    passes that had, moves the codes. They begin un-quantised: for `warmup_steps` steps and one more nothing is looked
    up, and the end of that one sets the codes by k-means on its vectors. Codes that no vector chose for `revive_after`
    steps are replaced by vectors of the current one. All statistics are summed over processes; all state lies in
    buffers and survives a resume. No step but the one that sets the codes waits for the device.

    Args:
        vocab_size: V.
        channels: C.
        decay: of the moving averages.
        warmup_steps: steps of the optimiser before the one that initialises the codes.
        revive_after: steps without a use after which a code is replaced.
        cosine: look up by the angle between vector and code instead of their distance. The codes themselves remain
            means of vectors, of any length.

    Raises:
        ValueError: naming the argument, its value and what is accepted; at the end of the warm-up if a batch has fewer
            vectors than there are codes to set.
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        *,
        decay: float = 0.99,
        warmup_steps: int = 0,
        revive_after: int = 100,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if revive_after < 1:
            raise ValueError(f"revive_after must be at least 1, got {revive_after}")
        self.decay, self.warmup_steps, self.revive_after, self.cosine = decay, warmup_steps, revive_after, cosine
        self.embedding = nn.Embedding(vocab_size, channels)
        self.embedding.weight.requires_grad_(False)
        nn.init.trunc_normal_(self.embedding.weight)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("counts", torch.ones(vocab_size))
        self.register_buffer("sums", self.embedding.weight.detach().clone())
        self.register_buffer("idle", torch.zeros(vocab_size, dtype=torch.long))
        self._clock: int | None = None
        self._collected: list[tuple[list[Tensor], list[Tensor]]] = []
        self.register_load_state_dict_post_hook(_forget_clock)

    updates: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.num_embeddings

    @property
    def channels(self) -> int:
        """C."""
        return self.embedding.embedding_dim

    @property
    def clock(self) -> int:
        """Steps so far: `updates` on the host, where asking waits for no device."""
        if self._clock is None:
            self._clock = int(self.updates)
        return self._clock

    @property
    def warming_up(self) -> bool:
        """Whether everything still passes un-quantised: no step has set the codes."""
        return self.clock <= self.warmup_steps

    @property
    def needs_init(self) -> bool:
        """Whether this training step has to initialise the codes."""
        return self.training and self.clock == self.warmup_steps

    def nearest(self, vectors: Tensor) -> Tensor:
        """Indices of the nearest codes: (N, C) -> (N,) int64. Under autocast too in the precision of its arguments."""
        return self._remoteness(vectors).argmin(1)

    def ranked(self, vectors: Tensor, count: int) -> Tensor:
        """Indices of the nearest codes, nearest first: (N, C) -> (N, count) int64."""
        return self._remoteness(vectors).topk(count, dim=1, largest=False).indices

    def _remoteness(self, vectors: Tensor) -> Tensor:
        """(N, C) -> (N, V), the lower the nearer."""
        codes = self.embedding.weight.to(vectors.dtype)
        with no_autocast(vectors):
            if self.cosine:
                return -(vectors @ F.normalize(codes, dim=1).T)
            return torch.addmm(codes.square().sum(1), vectors, codes.T, alpha=-2)

    def forward(self, indices: Tensor) -> Tensor:
        """(...) indices -> (..., C) codes."""
        return self.embedding(indices)

    def check_pool(self, sizes: Sequence[int]) -> None:
        """Refuse a batch that could not initialise the codes.

        Args:
            sizes: vectors of each scale in one batch of all processes.

        Raises:
            ValueError: if fewer of them than there are codes would be drawn.
        """
        share = -(-POOL * self.vocab_size // len(sizes))
        drawn = sum(min(size, share) for size in sizes)
        if drawn < self.vocab_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} is more than the {drawn} vectors of one batch can initialise: "
                "lower vocab_size or raise batch_size"
            )

    def collect(self, vectors: Sequence[Tensor], indices: Sequence[Tensor] = ()) -> None:
        """Keep for `step` what a pass in training mode saw.

        Args:
            vectors: of every scale, (N_s, C) each, without gradients.
            indices: the codes they chose, (N_s,) each; none where the step is to initialise the codes.
        """
        self._collected.append((list(vectors), list(indices)))

    def step(self) -> None:
        """End a step of the optimiser: set or move the codes by what its passes have collected, and count it."""
        if self._collected:
            pool, indices = (
                [torch.cat(parts) for parts in zip(*passes, strict=True)]
                for passes in zip(*self._collected, strict=True)
            )
            self._collected.clear()
            if self.warming_up:
                self.initialise(pool)
            else:
                self.update(pool, indices)
        self._clock = self.clock + 1
        self.updates.fill_(self._clock)

    @torch.no_grad()
    def initialise(self, pool: Sequence[Tensor]) -> None:
        """Set the codes by k-means on `pool`, one (N_s, C) tensor per scale, no scale giving more than its share.

        Raises:
            ValueError: if the pool holds fewer vectors than there are codes.
        """
        vectors = self._draw(pool, POOL * self.vocab_size)
        self.check_pool([len(vectors)])
        vectors = vectors[torch.randperm(len(vectors), generator=self._generator()).to(vectors.device)]
        codes = vectors[_distinct_first(vectors)[: self.vocab_size]]
        for _ in range(KMEANS_ITERATIONS):
            self.embedding.weight.copy_(codes)
            nearest = torch.cat([self.nearest(part) for part in vectors.split(ROWS)])
            counts, sums = self._assigned(vectors, nearest)
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], codes)
        if _place()[1] > 1:
            distributed.broadcast(codes, 0)  # a GPU's sums differ by rounding from run to run
        self.embedding.weight.copy_(codes)
        self.counts.fill_(1)
        self.sums.copy_(codes)
        self.idle.zero_()

    @torch.no_grad()
    def update(self, pool: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
        """Move the codes towards the vectors that chose them, then revive the idle ones.

        Args:
            pool: vectors of every scale, (N_s, C) each.
            indices: the codes they chose, (N_s,) each.
        """
        vectors = torch.cat(list(pool))
        counts, sums = self._assigned(vectors, torch.cat(list(indices)))
        counts, sums, donors = _summed(counts[:, None], sums, self._donors(vectors, [len(z) for z in pool]))
        self.counts.lerp_(counts[:, 0], 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.idle.add_(1).mul_(counts[:, 0] == 0)
        # everywhere, if mostly in vain: asking whether there is any would wait for the device
        idle = self.idle >= self.revive_after
        self.sums.copy_(torch.where(idle[:, None], donors, self.sums))
        self.counts.masked_fill_(idle, 1)
        self.idle.masked_fill_(idle, 0)
        # a code that fades before it is revived stays where it was
        means = self.sums / self.counts.clamp_min(FADED)[:, None]
        self.embedding.weight.copy_(torch.where(self.counts[:, None] > FADED, means, self.embedding.weight))

    def _assigned(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many vectors chose each code, (V,), and their sums, (V, C)."""
        counts = vectors.new_zeros(self.vocab_size).index_add_(0, indices, torch.ones_like(vectors[:, 0]))
        return counts, torch.zeros_like(self.sums).index_add_(0, indices, vectors)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.clock)

    def _draw(self, pool: Sequence[Tensor], n: int) -> Tensor:
        """About n vectors of all processes, the scales weighing the same; the same draw in every process."""
        pool = [_joined(z) for z in pool]
        generator = self._generator()
        share = -(-n // len(pool))
        return torch.cat([z[torch.randperm(len(z), generator=generator)[:share].to(z.device)] for z in pool])

    def _donors(self, vectors: Tensor, sizes: Sequence[int]) -> Tensor:
        """A vector for every code, (V, C), drawn from all processes with repeats, the scales weighing the same. Zeros
        where another process holds the vector.

        Args:
            vectors: of all scales of this process, (N, C).
            sizes: how many are each scale's.
        """
        rank, processes = _place()
        generator = self._generator()
        share = -(-self.vocab_size // len(sizes))
        drawn, first = [], 0
        for size in sizes:
            row = torch.randint(size * processes, (share,), generator=generator)
            drawn.append(torch.where(row // size == rank, first + row % size, -1))
            first += size
        order = torch.randperm(share * len(sizes), generator=generator)[: self.vocab_size]
        rows = torch.cat(drawn)[order].to(vectors.device, non_blocking=True)
        return torch.where(rows[:, None] < 0, 0, vectors[rows.clamp_min(0)])
