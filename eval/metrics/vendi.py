"""Vendi score: the effective number of different samples.

Friedman & Dieng 2022 (arXiv:2210.02410): the exponential of the entropy of the eigenvalues of the
samples' similarity matrix over N, here of cosines. N samples alike score 1, N orthogonal ones N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, KeptMetric
from eval.stream import Reservoir


def vendi(features: Tensor) -> float:
    """The score of features (N, D), each taken at length one; at most min(N, D).

    The (D, D) matrix has the same eigenvalues as the (N, N) one, so the smaller is used.
    """
    tiny = torch.finfo(torch.double).tiny  # short vectors have a direction too
    x = torch.nn.functional.normalize(features.double(), dim=1, eps=tiny)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram / len(x))
    values = values[values > 0]
    return torch.exp(-(values * values.log()).sum()).item()


class Vendi(KeptMetric):
    """The Vendi score of samples; it grows with their number, so compare at equal numbers."""

    def __init__(self, features: Features, *, keep: int = 50_000, name: str = "vendi") -> None:
        self.features, self.keep, self.name = features, keep, name

    def measure(self, seen: Reservoir) -> dict[str, float]:
        if not len(seen.kept):
            raise MetricError(f"{self.name}: no samples; give one or more")
        return {self.name: vendi(seen.kept)}
