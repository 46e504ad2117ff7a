"""Fréchet distance between two sets of features, each summarised by its mean and covariance.

Heusel et al. 2017 (arXiv:1706.08500), on whichever features it is given; "FID" proper means
Inception's. All sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.samples import Samples

Features = Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> (N, D)


@dataclass(frozen=True)
class Moments:
    """The mean (D,) and the unbiased covariance (D, D) of n feature vectors, in float64."""

    mean: Tensor
    cov: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features shaped (N, D); N must exceed D, or the covariance is singular."""
        n, dim = features.shape
        if n <= dim:
            raise MetricError(
                f"frechet distance: {n} samples for {dim} features; give more than {dim} samples"
            )
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T), n)


def frechet(a: Moments, b: Moments) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½).

    The trace of the root is the sum of the roots of the eigenvalues of Σa Σb, taken through the
    symmetric Σa^½ Σb Σa^½, which has the same ones and stays real and non-negative under rounding.
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(distance.item(), 0.0)  # identical sets come out at ±1e-15


class FID:
    """Fréchet distance of samples to a fixed reference, as a metric."""

    def __init__(self, features: Features, reference: Tensor) -> None:
        """`reference` holds uint8 images (N, C, H, W)."""
        self.features = features
        self.reference = Moments.of(features(reference))

    def __call__(self, samples: Samples) -> dict[str, float]:
        return {"fd": frechet(Moments.of(self.features(samples.images)), self.reference)}
