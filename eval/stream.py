"""Features in chunks: what is kept of them, and how chunks and processes are put together.

Chunk i belongs to lane i % LANES, a lane belongs to one process, and lanes are put together in
their order. So figures are the same bits for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eval.errors import MetricError

LANES = 16


class Tally:
    """Running sums for the moments of feature vectors (N, D), in float64.

    Sums of squares are kept about the running mean, and two tallies are joined by the exact
    identity of Chan, Golub & LeVeque 1979, so means far from zero cost no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.double)  # (D,), once anything was added
        self.squares = torch.zeros(0, dtype=torch.double)  # (D, D), Σ (f - mean)(f - mean)ᵀ

    def add(self, features: Tensor, first: int) -> None:
        """Count features (N, D); the number of the first sample is of no account here."""
        features = features.T.double().cpu()
        part = Tally()
        part.n, part.mean = features.shape[1], features.mean(1)
        features = features - part.mean[:, None]
        part.squares = features @ features.T
        self.merge(part)

    def weigh(self, mean: Tensor, n: int) -> None:
        """Count n samples of which only the mean (D,) is known; it alone is then of use."""
        part = Tally()
        part.n, part.mean = n, mean.double()
        part.squares = torch.zeros(len(mean), len(mean), dtype=torch.double)
        self.merge(part)

    def merge(self, other: Tally) -> None:
        """Count what another has counted."""
        if not self.n or not other.n:
            if other.n:
                self.n, self.mean, self.squares = other.n, other.mean, other.squares
            return
        n, gap = self.n + other.n, other.mean - self.mean
        squares = self.squares + other.squares
        self.squares = squares.addr_(gap, gap, alpha=self.n * other.n / n)
        self.mean = self.mean + gap * (other.n / n)
        self.n = n

    def tensors(self) -> list[Tensor]:
        return [torch.tensor([self.n]), self.mean, self.squares]

    def filled(self, tensors: list[Tensor]) -> Tally:
        """The tally that `tensors` came from."""
        made = Tally()
        made.n, (made.mean, made.squares) = int(tensors[0].item()), tensors[1:]
        return made


def _ranks(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random uint64 for each sample number (splitmix64, Steele et al. 2014)."""
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z ^= np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Reservoir:
    """A uniform random choice of at most `size` of the feature vectors, in the samples' order.

    A sample's place hangs on its number alone: those of the `size` lowest ranks stay, so neither
    chunks nor processes change the choice. All stay while there are no more than `size`.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.numbers = torch.zeros(0, dtype=torch.long)  # (K,), rising
        self.kept = torch.zeros(0)  # (K, D) float32, once anything was added

    def add(self, features: Tensor, first: int) -> None:
        """Offer features (N, D) of the samples numbered from `first`."""
        part = Reservoir(self.size, self.seed)
        part.numbers = torch.arange(first, first + len(features))
        part.kept = features.float().cpu()
        self.merge(part)

    def merge(self, other: Reservoir) -> None:
        """Offer what another has kept."""
        numbers = torch.cat([self.numbers, other.numbers])
        if not len(numbers):
            return
        chosen = torch.arange(len(numbers))
        if len(numbers) > self.size:
            order = _ranks(numbers.numpy(), self.seed).argsort(kind="stable")
            chosen = torch.from_numpy(order[: self.size])
        chosen = chosen[numbers[chosen].argsort()]
        parts = [part.kept for part in (self, other) if len(part.kept)]
        self.numbers, self.kept = numbers[chosen], torch.cat(parts)[chosen]

    def tensors(self) -> list[Tensor]:
        return [self.numbers, self.kept]

    def filled(self, tensors: list[Tensor]) -> Reservoir:
        """The reservoir that `tensors` came from."""
        made = Reservoir(self.size, self.seed)
        made.numbers, made.kept = tensors
        return made


class Processes(NamedTuple):
    """How many processes measure together, and which of them this is."""

    rank: int = 0
    count: int = 1

    def mine(self, chunk: int) -> bool:
        """Whether a chunk of that number is drawn and read by this process.

        Raises:
            MetricError: there are more processes than lanes.
        """
        if self.count > LANES:
            raise MetricError(
                f"measuring: {self.count} processes; at most {LANES} can share the samples"
            )
        return chunk % LANES % self.count == self.rank


ALONE = Processes()


def _broadcast(tensors: list[Tensor], owner: int, processes: Processes) -> list[Tensor]:
    """The owner's tensors, of at most two dimensions, on every process."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = []
    for tensor in tensors:  # as many and of the same types everywhere; shapes are the owner's
        shape = torch.tensor([tensor.dim(), *tensor.shape, 0, 0][:3], device=device)
        dist.broadcast(shape, owner)
        dim, *sizes = shape.tolist()
        mine = owner == processes.rank
        there = tensor if mine else torch.empty(sizes[:dim], dtype=tensor.dtype)
        there = there.to(device).contiguous()
        dist.broadcast(there, owner)
        found.append(there.cpu())
    return found


C = TypeVar("C", Tally, Reservoir)


class Lanes(Generic[C]):
    """A collector for each lane that this process reads."""

    def __init__(self, make: Callable[[], C]) -> None:
        self.make = make
        self.lanes: dict[int, C] = {}

    def of(self, chunk: int) -> C:
        """Where the chunk of that number goes."""
        lane = chunk % LANES
        if lane not in self.lanes:
            self.lanes[lane] = self.make()
        return self.lanes[lane]

    def joined(self, processes: Processes) -> C:
        """All lanes of all processes as one, on every process."""
        whole = self.make()
        for lane in range(LANES):
            part = self.lanes.get(lane) or self.make()
            if processes.count > 1:
                owner = lane % processes.count
                part = part.filled(_broadcast(part.tensors(), owner, processes))
            whole.merge(part)
        return whole
