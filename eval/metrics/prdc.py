"""Precision, recall, density and coverage: fidelity and diversity from nearest-neighbour balls.

Kynkäänniemi et al. 2019 (arXiv:1904.06991) and Naeem et al. 2020 (arXiv:2002.09797). A ball
is open (strict <) and reaches from a point to its k-th neighbour in its own set, without itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, ReservoirMetric
from eval.stream import Reservoir

ROWS = 2048  # of the distance matrix in memory at a time: 0.8 GB against 50,000 points


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances (N, M) between (N, D) and (M, D) points, exactly 0 between copies.

    They are computed from differences. A matrix product is up to ten times as fast, but a common
    offset of all points costs it precision, and it fails for nearly equal points.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def radii(features: Tensor, k: int) -> Tensor:
    """The distance (N,) from each of (N, D) points to its k-th nearest other point."""
    parts = features.split(ROWS)
    return torch.cat([distances(p, features).kthvalue(k + 1, dim=1).values for p in parts])


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density, coverage of fake (M, D) against real (N, D) features.

    Equal distributions give density ≈ 1 and coverage ≈ 1 - Π (N-i)/(2N-i), 0.969 for k = 5. Their
    precision and recall are below 1, so compare these with figures of real data against real data.

    Raises:
        MetricError: either set has no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise MetricError(
            f"prdc: {min(len(real), len(fake))} samples for k = {k}; give more than {k}"
        )
    real, fake = real.double(), fake.double()
    real_ball, fake_ball = radii(real, k), radii(fake, k)
    holding = torch.zeros(len(fake), dtype=torch.long, device=fake.device)
    recalled = covered = 0
    for part, ball in zip(real.split(ROWS), real_ball.split(ROWS)):
        gap = distances(part, fake)  # (≤ ROWS, M)
        holding += (gap < ball[:, None]).sum(0)
        recalled += (gap < fake_ball).any(1).sum().item()
        covered += (gap.min(1).values < ball).sum().item()
    return {
        "precision": (holding > 0).double().mean().item(),
        "recall": recalled / len(real),
        "density": holding.double().mean().item() / k,
        "coverage": covered / len(real),
    }


class PRDC(ReservoirMetric):
    """Precision, recall, density and coverage against a fixed reference, as a metric.

    Neighbours are counted among at most `keep` random samples of each set. Balls shrink as sets
    grow, so figures with different `keep` are not comparable.
    """

    def __init__(
        self, features: Features, reference: Tensor, k: int = 5, keep: int = 50_000
    ) -> None:
        """`reference` holds uint8 images (N, C, H, W), or their features (N, D)."""
        self.features, self.k, self.keep, self.min_samples = features, k, keep, k + 1
        chosen = Reservoir(keep)
        chosen.add(features(reference) if reference.dim() == 4 else reference, 0)
        self.reference = chosen.features

    def measure(self, collected: Reservoir) -> dict[str, float]:
        return prdc(self.reference, collected.features, self.k)
