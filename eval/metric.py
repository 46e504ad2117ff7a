"""Metrics: samples in, numbers out, at once or in chunks.

A plain function of samples is an average over them: over chunks, its figures are averaged by their
sizes. A `FeatureMetric` reads what was collected of features over all chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.samples import Samples
from eval.stream import ALONE, C, Lanes, Processes, Reservoir, Tally

Features = Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> (N, D)
Metric = Callable[[Samples], dict[str, float]]


class FeatureMetric(ABC, Generic[C]):
    """A metric of the law of features; a subclass below says what it reads of them.

    features: what it reads of a picture.
    keep: how many feature vectors it wants; 0 when their moments are enough.
    least: the fewest samples that it can be had of, so that too few are refused undrawn.
    """

    features: Features
    keep: int
    least: int = 1

    @abstractmethod
    def collector(self) -> C:
        """What features are to be put into."""

    @abstractmethod
    def measure(self, seen: C) -> dict[str, float]:
        """Its figures, of the collector when it has all features."""

    def __call__(self, samples: Samples) -> dict[str, float]:
        seen = self.collector()
        seen.add(checked(self.features(samples.images)), 0)
        return self.measure(seen)


class MomentsMetric(FeatureMetric[Tally]):
    """A metric of mean and covariance."""

    keep = 0

    def collector(self) -> Tally:
        return Tally()


class KeptMetric(FeatureMetric[Reservoir]):
    """A metric of feature vectors, `keep` of them at most."""

    def collector(self) -> Reservoir:
        return Reservoir(self.keep)


def checked(features: Tensor) -> Tensor:
    """Features (N, D), all finite.

    Raises:
        MetricError: some are not; a NaN would spread over every figure.
    """
    bad = (~torch.isfinite(features)).flatten(1).any(1).sum().item()
    if bad:
        raise MetricError(f"features: those of {bad} of {len(features)} images hold NaN")
    return features


def measure(
    metrics: Sequence[Metric],
    chunks: Iterable[tuple[int, int, Samples]],
    processes: Processes = ALONE,
) -> dict[str, float]:
    """All figures of samples that come in chunks and are held one chunk at a time.

    Features are read once for all metrics that share them.

    Args:
        chunks: the number of a chunk, the number of its first sample, and its samples; those of
            this process alone, where several measure together. A process without any has no
            averages in the end.

    Raises:
        MetricError: features are not finite, or two metrics give a figure of one name.
    """
    averages = [m for m in metrics if not isinstance(m, FeatureMetric)]
    readers = [m for m in metrics if isinstance(m, FeatureMetric)]
    lanes = {(m.features, m.keep): Lanes[Any](m.collector) for m in readers}
    means, names = Lanes(Tally), []
    for number, first, samples in chunks:
        read = {f: checked(f(samples.images)) for f in {m.features for m in readers}}
        for (features, _), lane in lanes.items():
            lane.of(number).add(read[features], first)
        figures = {k: v for m in averages for k, v in m(samples).items()}
        names = list(figures)
        row = torch.tensor([*figures.values()], dtype=torch.double)
        means.of(number).weigh(row, len(samples.images))
    seen = {key: lane.joined(processes) for key, lane in lanes.items()}
    figures = [m.measure(seen[m.features, m.keep]) for m in readers]
    figures.append(dict(zip(names, means.joined(processes).mean.tolist())))
    found: dict[str, float] = {}
    for part in figures:
        if twice := found.keys() & part.keys():
            raise MetricError(f"metrics: two of them give {min(twice)!r}; leave one out")
        found |= part
    return found
