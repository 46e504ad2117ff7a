"""Metrics: from samples to named numbers, for all samples together or in chunks.

A metric that is a plain function gives averages over samples; those of several chunks are averaged
by the chunks' sizes. A `FeatureMetric` collects features over all chunks first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.samples import Samples
from eval.stream import C, MomentSums, Reservoir

Features = Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> (N, D)
Metric = Callable[[Samples], dict[str, float]]


class FeatureMetric(ABC, Generic[C]):
    """A metric of the distribution of features.

    features: from images to features.
    keep: the number of feature vectors that it needs; 0 if their moments suffice.
    min_samples: fewer samples are refused before any is made.
    """

    features: Features
    keep: int
    min_samples: int = 1

    @abstractmethod
    def collector(self) -> C:
        """A new collector of features."""

    @abstractmethod
    def measure(self, collected: C) -> dict[str, float]:
        """The figures of all features in a collector."""

    def __call__(self, samples: Samples) -> dict[str, float]:
        """The figures of all samples together."""
        collected = self.collector()
        collected.add(checked(self.features(samples.images)), 0)
        return self.measure(collected)


class MomentsMetric(FeatureMetric[MomentSums]):
    """A metric of the mean and covariance of features."""

    keep = 0

    def collector(self) -> MomentSums:
        return MomentSums()


class ReservoirMetric(FeatureMetric[Reservoir]):
    """A metric of at most `keep` feature vectors."""

    def collector(self) -> Reservoir:
        return Reservoir(self.keep)


def checked(features: Tensor) -> Tensor:
    """Features (N, D), if all are finite.

    Raises:
        MetricError: some are not; one NaN would spoil every figure.
    """
    bad = (~torch.isfinite(features)).flatten(1).any(1).sum().item()
    if bad:
        raise MetricError(
            f"features: those of {bad} of {len(features)} images hold NaN; leave these images out"
        )
    return features
