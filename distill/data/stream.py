"""An endless stream of batches, each of which can be made without the batches before it.

Shard k of batch d depends only on (seed, d, k). A resumed run therefore needs only its number of
batches, and N processes draw exactly what one process draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distill.config.schema import CouplingSection
from distill.objectives.base import Batch
from distill.seeds import seed_of
from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Cond
from teachers.errors import UserError

LABELS = "class_labels"  # the condition of class-conditional networks
AHEAD = 3  # shards that are prepared in advance


class Items(NamedTuple):
    """Items of a source: data (B, ...), conditions, and noise (B, ...) if it is stored.

    path: the states (B, T, ...) between noise and data, if they are stored.
    """

    x: Tensor | None
    cond: Cond
    noise: Tensor | None = None
    path: Tensor | None = None


class Source:
    """Encoded data (N, ...) with conditions, or conditions only, in memory.

    A subclass that stores them elsewhere overrides `take`; one of several sources, `batch`.

    Args:
        shape: The shape of one datum, without the batch.
        x: (N, ...), or None if the objective needs no data.
        cond: Entries (N, ...), or None.
        size: N, the number of items.
        noise: (N, ...), the noise that each datum was made from; None for new noise each time.
        path: (N, T, ...), the states between them; None if they are not stored.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        x: Tensor | None,
        cond: Cond,
        seed: int,
        size: int,
        noise: Tensor | None = None,
        path: Tensor | None = None,
    ) -> None:
        self.shape, self.x, self.cond, self.seed, self.noise = shape, x, cond, seed, noise
        self.size, self.path = size, path
        self.report: dict[str, Any] | None = None  # for data-report.json, if files were read
        self.coupling: CouplingSection | None = None
        self.evaluations = 0  # of the teacher's network, that its items took to make
        self.prompts: Sequence[Any] | None = None  # or labels, of each item; None: not known
        self._order = lru_cache(2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.size, generator=rng)

    def batch(self, draw: int, shard: int, shards: int, size: int) -> Batch:
        """Shard `shard` of `shards`, each with `size` items, of batch number `draw`; on the CPU.

        Each epoch visits every item once, in its own order.
        """
        first = (draw * shards + shard) * size
        positions = torch.arange(first, first + size)
        epochs, places = positions // self.size, positions % self.size
        index = torch.cat(
            [
                self._order(int(e))[places[epochs == e]]
                for e in range(int(epochs[0]), int(epochs[-1]) + 1)
            ]
        )
        x, cond, noise, path = self.take(index)
        if noise is None:
            rng = torch.Generator().manual_seed(seed_of(self.seed, "noise", draw, shard))
            noise = torch.randn(size, *self.shape, generator=rng)
            if self.coupling is not None and x is not None:
                noise = coupled(self.coupling, x, noise, cond, rng)
        return Batch(x, noise, cond, index, path)

    def couple(self, coupling: CouplingSection | None) -> None:
        """Give each datum its noise by this coupling from now on.

        Raises:
            UserError: the noise is stored, each with the datum that was made from it.
        """
        if coupling is None:
            return
        if self.noise is not None:
            raise UserError(
                "data.coupling: the data are stored with the noise that they were made from; "
                "remove it"
            )
        self.coupling = coupling

    def take(self, index: Tensor) -> Items:
        """The items with the numbers `index` (B,)."""
        stored = (self.x, self.noise, self.path)
        x, noise, path = (None if v is None else v[index] for v in stored)
        return Items(x, conditions.rows(self.cond, index), noise, path)


class Buckets(Source):
    """Sources with different shapes of data; each batch comes from one source.

    The batches of a source are spread evenly, in proportion to its size: in a round of as many
    batches as there are items, each source has as many batches as items. Within a source, each
    epoch visits every item once. Items are numbered through all sources, in their order.
    """

    def __init__(self, parts: Sequence[Source], seed: int) -> None:
        size = sum(p.size for p in parts)
        super().__init__(parts[0].shape, None, None, seed, size)
        self.parts = parts
        self.starts = [sum(p.size for p in parts[:i]) for i in range(len(parts))]
        prompts = [p.prompts for p in parts if p.prompts is not None]
        if len(prompts) == len(parts):
            self.prompts = [prompt for part in prompts for prompt in part]
        self._rounds = lru_cache(2)(self._round)

    def couple(self, coupling: CouplingSection | None) -> None:
        for part in self.parts:
            part.couple(coupling)

    def _round(self, number: int) -> tuple[Tensor, Tensor]:
        """For each of a round's `size` batches: its part, and how many of it came before."""
        rng = torch.Generator().manual_seed(seed_of(self.seed, "buckets", number))
        sizes = torch.tensor([p.size for p in self.parts])
        part = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        turn = torch.cat([torch.arange(p.size) for p in self.parts])
        offsets = torch.rand(len(sizes), dtype=torch.float64, generator=rng)
        order = ((turn + offsets[part]) / sizes[part]).argsort(stable=True)
        return part[order], turn[order]

    def batch(self, draw: int, shard: int, shards: int, size: int) -> Batch:
        """Shard `shard` of batch number `draw`; its part depends only on `draw`."""
        number, place = divmod(draw, self.size)
        part, turn = (int(v[place]) for v in self._rounds(number))
        source = self.parts[part]
        batch = source.batch(number * source.size + turn, shard, shards, size)
        assert batch.items is not None
        return batch._replace(items=batch.items + self.starts[part])


def coupled(
    coupling: CouplingSection, x: Tensor, noise: Tensor, cond: Cond, rng: torch.Generator
) -> Tensor:
    """The noise (B, ...) of each datum of x (B, ...).

    Args:
        noise: Independent of x.
        rng: Where further draws come from.
    """
    if coupling.kind == "nearest":
        more = torch.randn(coupling.candidates - 1, *noise.shape, generator=rng)
        draws = torch.cat([noise[None], more])
        nearest = (draws - x).flatten(2).square().sum(2).argmin(0)
        return draws[nearest, torch.arange(len(x))]
    labels = (cond or {}).get(LABELS) if coupling.by_label else None
    groups = torch.zeros(len(x)) if labels is None else labels
    result = noise.clone()
    for group in groups.unique():
        places = (groups == group).nonzero()[:, 0]
        result[places] = noise[places[assigned(coupling, x[places], noise[places])]]
    return result


def assigned(coupling: CouplingSection, x: Tensor, noise: Tensor) -> Tensor:
    """The permutation (B,) of the noise (B, ...) that is nearest to x (B, ...) in sum."""
    a, b = x.flatten(1), noise.flatten(1)
    if coupling.kind == "immiscible":
        cost = torch.cdist(a.half().float(), b.half().float()).half()
    else:  # squared distances, up to terms that all assignments share
        cost = -(a.double() @ b.double().T)
    return torch.from_numpy(linear_sum_assignment(cost.float().numpy())[1])


class Scaled(Source):
    """A source whose conditions have a guidance scale, drawn evenly from a range for each sample.

    Args:
        source: Its conditions are not None.
        low, high: The range of scales g.
    """

    def __init__(self, source: Source, low: float, high: float) -> None:
        super().__init__(source.shape, source.x, source.cond, source.seed, source.size)
        self.source, self.low, self.high = source, low, high
        self.report, self.prompts = source.report, source.prompts
        self.evaluations = source.evaluations

    def batch(self, draw: int, shard: int, shards: int, size: int) -> Batch:
        batch = self.source.batch(draw, shard, shards, size)
        rng = torch.Generator().manual_seed(seed_of(self.seed, "guidance", draw, shard))
        scale = self.low + (self.high - self.low) * torch.rand(len(batch.noise), generator=rng)
        return batch._replace(cond={**(batch.cond or {}), GUIDANCE_SCALE: scale})

    def take(self, index: Tensor) -> Items:
        return self.source.take(index)


class Stream:
    """A source's batches for this process, prepared on a thread and moved to the device.

    Args:
        draw: The number of the first batch.
        mine: The shards of each batch that this process takes, in order.
        shards: The number of shards of a batch, over all processes.
        size: The number of items in a shard.
        ahead: The number of shards that are prepared in advance.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        draw: int,
        mine: range,
        shards: int,
        size: int,
        ahead: int = AHEAD,
    ) -> None:
        self.source, self.device = source, device
        self.mine, self.shards, self.size = mine, shards, size
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self.places = self._places(draw)
        self.waiting: list[Future[Batch]] = [self._submit() for _ in range(ahead)]

    def _places(self, draw: int) -> Iterator[tuple[int, int]]:
        while True:
            yield from ((draw, shard) for shard in self.mine)
            draw += 1

    def _submit(self) -> Future[Batch]:
        return self.pool.submit(self._make, *next(self.places))

    def _make(self, draw: int, shard: int) -> Batch:
        batch = self.source.batch(draw, shard, self.shards, self.size)
        if self.device.type == "cpu":
            return batch

        def move(v: Tensor) -> Tensor:
            return v.pin_memory().to(self.device, non_blocking=True)

        x, path = (None if v is None else move(v) for v in (batch.x, batch.path))
        cond = conditions.each(batch.cond, move)
        return Batch(x, move(batch.noise), cond, batch.items, path)

    def __next__(self) -> Batch:
        self.waiting.append(self._submit())
        return self.waiting.pop(0).result()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
