"""Figures extrapolated to infinitely many samples, and latents that converge sooner.

Chong & Forsyth 2020 (arXiv:1911.07023): FID and Inception score have a bias of about c / N, so a
line through figures of several sizes gives an unbiased figure at 1 / N = 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.errors import MetricError


def sizes(name: str, n: int, start: int, points: int) -> list[int]:
    """`points` numbers of samples, evenly from `start` to n.

    Raises:
        MetricError: n does not exceed `start`; `name` is the metric's.
    """
    if n <= start:
        raise MetricError(
            f"{name}: {n} samples for subsets of {start} and more; give more than {start}"
        )
    return [int(v) for v in np.linspace(start, n, points)]


def subset(features: Tensor, n: int, seed: int) -> Tensor:
    """A random choice of n of the (N, D) features, without replacement."""
    rng = torch.Generator().manual_seed(seed)
    return features[torch.randperm(len(features), generator=rng)[:n]]


def at_infinity(counts: list[int], figures: list[float]) -> float:
    """The value at 1 / count = 0 of the least-squares line through (1 / count, figure)."""
    x = 1 / torch.tensor(counts, dtype=torch.double)
    y = torch.tensor(figures, dtype=torch.double)
    x_mean, y_mean = x.mean(), y.mean()
    slope = ((x - x_mean) * (y - y_mean)).sum() / (x - x_mean).square().sum()
    return (y_mean - slope * x_mean).item()


def sobol_normal(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal latents (n, *shape) from a scrambled Sobol sequence, by the inverse CDF.

    They fill the space more evenly than independent latents, so figures converge with fewer
    samples. Use them for extrapolated figures only, because they are not independent.

    Raises:
        MetricError: a latent has more numbers than the sequence has dimensions.
    """
    dim = int(np.prod(shape))
    max_dim = torch.quasirandom.SobolEngine.MAXDIM
    if dim > max_dim:
        raise MetricError(
            f"sobol latents: {dim} numbers a sample; the sequence has {max_dim} dimensions; "
            "use independent latents"
        )
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(
        n, dtype=torch.double
    )
    edge = 2.0**-31  # half the sequence's resolution; 0 and 1 would become infinite
    return torch.special.ndtri(points.clamp(edge, 1 - edge)).float().view(n, *shape)
