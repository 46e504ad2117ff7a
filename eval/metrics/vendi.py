"""Vendi score: the effective number of different samples.

Friedman & Dieng 2022 (arXiv:2210.02410): the exponential of the entropy of the eigenvalues of the
samples' similarity matrix over N, here of cosines. N equal samples give 1, N orthogonal ones N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, ReservoirMetric
from eval.stream import Reservoir


def vendi(features: Tensor) -> float:
    """The score of features (N, D), normalised to length one; at most min(N, D).

    The (D, D) and the (N, N) matrix have the same eigenvalues, so the smaller one is used.
    """
    tiny = torch.finfo(torch.double).tiny  # so that short vectors keep their direction
    x = torch.nn.functional.normalize(features.double(), dim=1, eps=tiny)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram / len(x))
    values = values[values > 0]
    return torch.exp(-(values * values.log()).sum()).item()


class Vendi(ReservoirMetric):
    """The Vendi score of samples; it grows with their number, so compare equal numbers."""

    def __init__(self, features: Features, *, keep: int = 50_000, name: str = "vendi") -> None:
        self.features, self.keep, self.name = features, keep, name

    def measure(self, collected: Reservoir) -> dict[str, float]:
        if not len(collected.features):
            raise MetricError(f"{self.name}: no samples; give one or more")
        return {self.name: vendi(collected.features)}
