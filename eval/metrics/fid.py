"""The Fréchet distance between two sets of features, from their means and covariances.

Heusel et al. 2017 (arXiv:1706.08500), for any features; "FID" is the one of Inception features.
All sums are in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, MomentsMetric, ReservoirMetric
from eval.metrics.extrapolate import at_infinity, sizes, subset
from eval.stream import MomentSums, Reservoir


@dataclass(frozen=True)
class Moments:
    """The mean (D,) and the unbiased covariance (D, D) of n feature vectors, in float64."""

    mean: Tensor
    cov: Tensor
    n: int

    @classmethod
    def from_features(cls, features: Tensor) -> Moments:
        """The moments of features (N, D).

        Raises:
            MetricError: N does not exceed D, so the covariance would be singular.
        """
        sums = MomentSums()
        sums.add(features, 0)
        return cls.from_sums(sums)

    @classmethod
    def from_sums(cls, sums: MomentSums) -> Moments:
        """The moments of running sums.

        Raises:
            MetricError: the number of samples does not exceed that of features.
        """
        dim = len(sums.mean)
        if sums.n <= dim:
            raise MetricError(
                f"frechet distance: {sums.n} samples for {dim} features; "
                f"give more than {dim} samples"
            )
        return cls(sums.mean, sums.squares / (sums.n - 1), sums.n)


def frechet(a: Moments, b: Moments) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½).

    The trace of the root is the sum of the square roots of the eigenvalues of Σa Σb. They are
    computed from the symmetric Σa^½ Σb Σa^½, which has the same eigenvalues and keeps them real and
    non-negative under rounding.
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(distance.item(), 0.0)  # identical sets give ±1e-15


def bias(spectrum: Tensor, n: int) -> float:
    """The expected distance of n samples of a Gaussian to that Gaussian, to first order in 1 / n.

    Σ λ_i / n + Σ_ij λ_i λ_j (1 + δ_ij) / (2 (λ_i + λ_j)) / (n - 1): the error of the mean, and that
    of the covariance (Wishart, variance λ_i λ_j (1 + δ_ij) / (n - 1)).

    Args:
        spectrum: the eigenvalues (D,) of the covariance; rounding may make some negative.
    """
    lam = spectrum[spectrum > spectrum.max() * 1e-12]
    pairs = lam[:, None] * lam / (2 * (lam[:, None] + lam))
    return (lam.sum() / n + (pairs.sum() + pairs.trace()) / (n - 1)).item()


class FID(MomentsMetric):
    """The Fréchet distance of samples to a fixed reference, as a metric.

    It also gives `<name>_bias`: the distance expected of as many independent samples of the
    reference's own distribution. Fixed labels or captions lower it, as strata lower a variance.
    """

    def __init__(
        self, features: Features, reference: Tensor | Moments, *, name: str = "fd"
    ) -> None:
        """`reference` holds uint8 images (N, C, H, W), or their features' moments."""
        self.features, self.name = features, name
        self.reference = (
            reference
            if isinstance(reference, Moments)
            else Moments.from_features(features(reference))
        )
        self.min_samples = len(self.reference.mean) + 1

    @cached_property
    def spectrum(self) -> Tensor:
        return torch.linalg.eigvalsh(self.reference.cov)

    def measure(self, collected: MomentSums) -> dict[str, float]:
        moments = Moments.from_sums(collected)
        expected = bias(self.spectrum, moments.n) + bias(self.spectrum, self.reference.n)
        return {self.name: frechet(moments, self.reference), f"{self.name}_bias": expected}


class FIDInfinity(ReservoirMetric):
    """The Fréchet distance extrapolated to infinitely many samples by a line in 1 / N.

    Chong & Forsyth 2020 (arXiv:1911.07023). The bias of the finite reference remains.
    """

    def __init__(
        self,
        features: Features,
        reference: Tensor | Moments,
        *,
        start: int = 5000,
        keep: int = 50_000,
        points: int = 15,
        name: str = "fd_infinity",
    ) -> None:
        """The line goes through `points` random subsets, of `start` up to `keep` samples."""
        self.features, self.name, self.keep = features, name, keep
        self.start, self.points, self.min_samples = start, points, start + 1
        self.reference = (
            reference
            if isinstance(reference, Moments)
            else Moments.from_features(features(reference))
        )

    def measure(self, collected: Reservoir) -> dict[str, float]:
        counts = sizes(self.name, len(collected.features), self.start, self.points)
        distances = [
            frechet(Moments.from_features(subset(collected.features, n, seed)), self.reference)
            for seed, n in enumerate(counts)
        ]
        return {self.name: at_infinity(counts, distances)}
