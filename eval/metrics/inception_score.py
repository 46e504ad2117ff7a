"""Inception score: images that a classifier is confident of, from many classes.

Salimans et al. 2016 (arXiv:1606.03498): exp E KL(p(y | x), p(y)), between 1 and the number of
classes. It has no reference, so it does not measure similarity to data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, ReservoirMetric
from eval.metrics.extrapolate import at_infinity, sizes, subset
from eval.stream import Reservoir


def score(logits: Tensor) -> float:
    """The score of one set of logits (N, K)."""
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # of p; finite where p is 0
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()


class InceptionScore(ReservoirMetric):
    """The mean over `splits` of the shuffled samples, and its standard deviation.

    Small sets lower it: confident and even predictions of K classes lose about a factor
    exp(-(K - 1) / 2N), so the size N of a split (5,000 in papers) is part of the metric.
    """

    def __init__(
        self,
        features: Features,
        *,
        splits: int = 10,
        keep: int = 50_000,
        name: str = "inception_score",
    ) -> None:
        """`features` are the classifier's logits (N, K)."""
        self.features, self.splits, self.keep, self.name = features, splits, keep, name
        self.min_samples = 2 * splits

    def measure(self, collected: Reservoir) -> dict[str, float]:
        n = len(collected.features)
        if n < self.min_samples:
            raise MetricError(
                f"{self.name}: {n} samples in {self.splits} splits; give {self.min_samples} or more"
            )
        parts = subset(collected.features, n, seed=0).tensor_split(self.splits)
        scores = torch.tensor([score(part) for part in parts], dtype=torch.double)
        return {
            self.name: scores.mean().item(),
            f"{self.name}_std": scores.std(unbiased=False).item(),
        }


class InceptionScoreInfinity(ReservoirMetric):
    """The score extrapolated to infinitely many samples (Chong & Forsyth, arXiv:1911.07023)."""

    def __init__(
        self,
        features: Features,
        *,
        start: int = 5000,
        keep: int = 50_000,
        points: int = 15,
        name: str = "inception_score_infinity",
    ) -> None:
        """`features` are the classifier's logits (N, K)."""
        self.features, self.keep, self.name = features, keep, name
        self.start, self.points, self.min_samples = start, points, start + 1

    def measure(self, collected: Reservoir) -> dict[str, float]:
        counts = sizes(self.name, len(collected.features), self.start, self.points)
        scores = [score(subset(collected.features, n, seed)) for seed, n in enumerate(counts)]
        return {self.name: at_infinity(counts, scores)}
