"""Fidelity and diversity apart: precision, recall, density, coverage on nearest-neighbour balls.

Kynkäänniemi et al. 2019 (arXiv:1904.06991) and Naeem et al. 2020 (arXiv:2002.09797). A ball reaches
from a point to its k-th neighbour in its own set (itself not counted), and is open: strict <.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, KeptMetric
from eval.stream import Reservoir

ROWS = 2048  # of the table of distances in memory at a time: 0.8 GB against 50,000 points


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances of (N, D) from (M, D) points, (N, M), of differences: exactly 0 between copies.

    By a matrix product it would be up to ten times as fast, and lose the digits that an offset
    common to all points takes, and all of them where points are alike.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def radii(features: Tensor, k: int) -> Tensor:
    """Distance from each of (N, D) points to its k-th nearest other point, shaped (N,)."""
    parts = features.split(ROWS)
    return torch.cat([distances(p, features).kthvalue(k + 1, dim=1).values for p in parts])


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density, coverage of fake (M, D) against real (N, D) features.

    Identical laws give density ≈ 1 and coverage ≈ 1 - Π (N-i)/(2N-i), 0.969 for k = 5; precision
    and recall are below 1 even then, so read them beside a real-against-real figure.

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


class PRDC(KeptMetric):
    """Precision, recall, density and coverage against a fixed reference, as a metric.

    Neighbours are counted among no more than `keep` of each, chosen at random: balls shrink as sets
    grow, so figures of different `keep` are of different metrics.
    """

    def __init__(
        self, features: Features, reference: Tensor, k: int = 5, keep: int = 50_000
    ) -> None:
        """`reference` holds uint8 images (N, C, H, W), or their features (N, D)."""
        self.features, self.k, self.keep, self.least = features, k, keep, k + 1
        chosen = Reservoir(keep)
        chosen.add(features(reference) if reference.dim() == 4 else reference, 0)
        self.reference = chosen.kept

    def measure(self, seen: Reservoir) -> dict[str, float]:
        return prdc(self.reference, seen.kept, self.k)
