"""Fréchet distance between two sets of features, each summarised by its mean and covariance.

Heusel et al. 2017 (arXiv:1706.08500), on whichever features it is given; "FID" proper means
Inception's. All sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, KeptMetric, MomentsMetric
from eval.metrics.extrapolate import at_infinity, sizes, subset
from eval.stream import Reservoir, Tally


@dataclass(frozen=True)
class Moments:
    """The mean (D,) and the unbiased covariance (D, D) of n feature vectors, in float64."""

    mean: Tensor
    cov: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features shaped (N, D); N must exceed D, or the covariance is singular.

        Raises:
            MetricError: it does not.
        """
        tally = Tally()
        tally.add(features, 0)
        return cls.counted(tally)

    @classmethod
    def counted(cls, tally: Tally) -> Moments:
        """The moments of what was counted.

        Raises:
            MetricError: that is no more samples than features.
        """
        dim = len(tally.mean)
        if tally.n <= dim:
            raise MetricError(
                f"frechet distance: {tally.n} samples for {dim} features; "
                f"give more than {dim} samples"
            )
        return cls(tally.mean, tally.squares / (tally.n - 1), tally.n)


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


def bias(spectrum: Tensor, n: int) -> float:
    """How far from zero the distance of n samples of a Gaussian law to that law itself will be.

    Σ λ_i / n + Σ_ij λ_i λ_j (1 + δ_ij) / (2 (λ_i + λ_j)) / (n - 1), to first order in 1 / n: the
    mean's error, and the covariance's (Wishart, variance λ_i λ_j (1 + δ_ij) / (n - 1)).

    Args:
        spectrum: the eigenvalues (D,) of the law's covariance; those of rounding may be negative.
    """
    lam = spectrum[spectrum > spectrum.max() * 1e-12]
    pairs = lam[:, None] * lam / (2 * (lam[:, None] + lam))
    return (lam.sum() / n + (pairs.sum() + pairs.trace()) / (n - 1)).item()


class FID(MomentsMetric):
    """Fréchet distance of samples to a fixed reference, as a metric.

    `<name>_bias` goes with it: the distance expected of as many independent samples of the
    reference's own law. Fixed labels or captions make it smaller, as strata do every variance.
    """

    def __init__(
        self, features: Features, reference: Tensor | Moments, *, name: str = "fd"
    ) -> None:
        """`reference` holds uint8 images (N, C, H, W), or their features' moments."""
        self.features, self.name = features, name
        self.reference = (
            reference if isinstance(reference, Moments) else Moments.of(features(reference))
        )
        self.least = len(self.reference.mean) + 1

    @cached_property
    def spectrum(self) -> Tensor:
        return torch.linalg.eigvalsh(self.reference.cov)

    def measure(self, seen: Tally) -> dict[str, float]:
        found = Moments.counted(seen)
        expected = bias(self.spectrum, found.n) + bias(self.spectrum, self.reference.n)
        return {self.name: frechet(found, self.reference), f"{self.name}_bias": expected}


class FIDInfinity(KeptMetric):
    """Fréchet distance that infinitely many samples would have: a line in 1 / N at N = ∞.

    Chong & Forsyth 2020 (arXiv:1911.07023). The reference's own finite size stays in the figure.
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
        """Distances of `points` random subsets, of `start` samples up to all that are kept."""
        self.features, self.name, self.keep = features, name, keep
        self.start, self.points, self.least = start, points, start + 1
        self.reference = (
            reference if isinstance(reference, Moments) else Moments.of(features(reference))
        )

    def measure(self, seen: Reservoir) -> dict[str, float]:
        counts = sizes(self.name, len(seen.kept), self.start, self.points)
        found = [
            frechet(Moments.of(subset(seen.kept, n, seed)), self.reference)
            for seed, n in enumerate(counts)
        ]
        return {self.name: at_infinity(counts, found)}
