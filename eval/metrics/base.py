"""Metrics: samples in, numbers out, at once or in chunks.

A plain function of samples is an average over them: over chunks, its figures are averaged by their
sizes. A `FeatureMetric` reads what was collected of features over all chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.samples import Samples
from eval.stream import C, Reservoir, Tally

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
