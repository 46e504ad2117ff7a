"""Fidelity and diversity apart: precision, recall, density, coverage on nearest-neighbour balls.

Kynkäänniemi et al. 2019 (arXiv:1904.06991) and Naeem et al. 2020 (arXiv:2002.09797). A ball reaches
from a point to its k-th neighbour in its own set (itself not counted), and is open: strict <.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.fid import Features
from eval.samples import Samples


def radii(features: Tensor, k: int) -> Tensor:
    """Distance from each of (N, D) points to its k-th nearest other point, shaped (N,)."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density, coverage of fake (M, D) against real (N, D) features.

    Identical laws give density ≈ 1 and coverage ≈ 1 - Π (N-i)/(2N-i), 0.969 for k = 5; precision
    and recall are below 1 even then, so read them beside a real-against-real figure.
    """
    if min(len(real), len(fake)) <= k:
        raise MetricError(
            f"prdc: {min(len(real), len(fake))} samples for k = {k}; give more than {k}"
        )
    real, fake = real.double(), fake.double()
    gap = torch.cdist(real, fake)  # (N, M)
    real_ball, fake_ball = radii(real, k)[:, None], radii(fake, k)[None]
    inside = gap < real_ball
    return {
        "precision": inside.any(0).double().mean().item(),
        "recall": (gap < fake_ball).any(1).double().mean().item(),
        "density": inside.double().sum(0).mean().item() / k,
        "coverage": (gap.min(1).values < real_ball[:, 0]).double().mean().item(),
    }


class PRDC:
    """Precision, recall, density and coverage against a fixed reference, as a metric."""

    def __init__(self, features: Features, reference: Tensor, k: int = 5) -> None:
        """`reference` holds uint8 images (N, C, H, W)."""
        self.features, self.k = features, k
        self.reference = features(reference)

    def __call__(self, samples: Samples) -> dict[str, float]:
        return prdc(self.reference, self.features(samples.images), self.k)
