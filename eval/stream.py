"""Collectors of features that come in chunks, and how chunks and processes are merged.

Chunk i goes to lane i % LANES; a process owns whole lanes, and lanes are merged in their order. The
figures are therefore the same bits for any number of processes.
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


class MomentSums:
    """Running sums for the mean and covariance of feature vectors (N, D), in float64.

    The squares are sums about the running mean, and two sums are merged by the exact identity of
    Chan, Golub & LeVeque 1979, so a mean far from zero costs no precision.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.double)  # (D,) after the first features
        self.squares = torch.zeros(0, dtype=torch.double)  # (D, D), Σ (f - mean)(f - mean)ᵀ

    def add(self, features: Tensor, first: int) -> None:
        """Add features (N, D); `first`, the number of the first sample, has no effect here."""
        features = features.T.double().cpu()
        part = MomentSums()
        part.n, part.mean = features.shape[1], features.mean(1)
        features = features - part.mean[:, None]
        part.squares = features @ features.T
        self.merge(part)

    def add_mean(self, mean: Tensor, n: int) -> None:
        """Add n samples with a known mean (D,) only; `squares` is then not valid."""
        part = MomentSums()
        part.n, part.mean = n, mean.double()
        part.squares = torch.zeros(len(mean), len(mean), dtype=torch.double)
        self.merge(part)

    def merge(self, other: MomentSums) -> None:
        """Add the samples of other sums."""
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
        """The state as tensors."""
        return [torch.tensor([self.n]), self.mean, self.squares]

    def from_tensors(self, tensors: list[Tensor]) -> MomentSums:
        """New sums with the state of `tensors`."""
        sums = MomentSums()
        sums.n, (sums.mean, sums.squares) = int(tensors[0].item()), tensors[1:]
        return sums


def _ranks(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random uint64 for each sample number (splitmix64, Steele et al. 2014)."""
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z ^= np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Reservoir:
    """A uniform random choice of at most `size` feature vectors, in the order of the samples.

    A sample's rank depends only on its number, and the `size` lowest ranks stay. Chunks and
    processes therefore do not change the choice. Up to `size` samples all stay.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.numbers = torch.zeros(0, dtype=torch.long)  # (K,), rising
        self.features = torch.zeros(0)  # (K, D) float32 after the first features

    def add(self, features: Tensor, first: int) -> None:
        """Offer features (N, D) of the samples numbered from `first`."""
        part = Reservoir(self.size, self.seed)
        part.numbers = torch.arange(first, first + len(features))
        part.features = features.float().cpu()
        self.merge(part)

    def merge(self, other: Reservoir) -> None:
        """Offer the samples of another reservoir."""
        numbers = torch.cat([self.numbers, other.numbers])
        if not len(numbers):
            return
        chosen = torch.arange(len(numbers))
        if len(numbers) > self.size:
            order = _ranks(numbers.numpy(), self.seed).argsort(kind="stable")
            chosen = torch.from_numpy(order[: self.size])
        chosen = chosen[numbers[chosen].argsort()]
        parts = [part.features for part in (self, other) if len(part.features)]
        self.numbers, self.features = numbers[chosen], torch.cat(parts)[chosen]

    def tensors(self) -> list[Tensor]:
        """The state as tensors."""
        return [self.numbers, self.features]

    def from_tensors(self, tensors: list[Tensor]) -> Reservoir:
        """A new reservoir with the state of `tensors`."""
        reservoir = Reservoir(self.size, self.seed)
        reservoir.numbers, reservoir.features = tensors
        return reservoir


class Processes(NamedTuple):
    """The number of processes that measure together, and the rank of this one."""

    rank: int = 0
    count: int = 1

    def owns(self, chunk: int) -> bool:
        """Whether this process samples the chunk of that number.

        Raises:
            MetricError: there are more processes than lanes.
        """
        if self.count > LANES:
            raise MetricError(
                f"measuring: {self.count} processes; start at most {LANES}, which share the samples"
            )
        return chunk % LANES % self.count == self.rank


ONE_PROCESS = Processes()


def _broadcast(tensors: list[Tensor], owner: int, processes: Processes) -> list[Tensor]:
    """The owner's tensors, of at most two dimensions, on every process.

    Every process passes as many tensors of the same types; the shapes are the owner's.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    received = []
    for tensor in tensors:
        shape = torch.tensor([tensor.dim(), *tensor.shape, 0, 0][:3], device=device)
        dist.broadcast(shape, owner)
        dim, *sizes = shape.tolist()
        owned = owner == processes.rank
        value = tensor if owned else torch.empty(sizes[:dim], dtype=tensor.dtype)
        value = value.to(device).contiguous()
        dist.broadcast(value, owner)
        received.append(value.cpu())
    return received


C = TypeVar("C", MomentSums, Reservoir)


class LaneCollectors(Generic[C]):
    """A collector for each lane that this process owns."""

    def __init__(self, factory: Callable[[], C]) -> None:
        self.factory = factory
        self.lanes: dict[int, C] = {}

    def collector(self, chunk: int) -> C:
        """The collector for the chunk of that number."""
        lane = chunk % LANES
        if lane not in self.lanes:
            self.lanes[lane] = self.factory()
        return self.lanes[lane]

    def merged(self, processes: Processes) -> C:
        """All lanes of all processes as one collector, on every process."""
        total = self.factory()
        for lane in range(LANES):
            part = self.lanes.get(lane) or self.factory()
            if processes.count > 1:
                owner = lane % processes.count
                part = part.from_tensors(_broadcast(part.tensors(), owner, processes))
            total.merge(part)
        return total
