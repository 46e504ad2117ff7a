"""Maximum mean discrepancy between two sets of features: KID and CMMD.

Gretton et al. 2012 (JMLR 13): |E k(x, x') + E k(y, y') - 2 E k(x, y)|. It assumes nothing about the
distributions and, without the diagonals, has no bias at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import Features, ReservoirMetric
from eval.stream import Reservoir

ROWS = 2048  # of a kernel matrix in memory at a time

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³, the kernel of KID."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|² / 2σ²); CMMD's σ is 10, for embeddings of length one."""
    square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(square.clamp(min=0) / (-2 * sigma**2))


def total(kernel: Kernel, x: Tensor, y: Tensor) -> float:
    """The sum of a kernel over all pairs, some rows at a time."""
    return sum(kernel(part, y).sum().item() for part in x.split(ROWS))


def diagonal(kernel: Kernel, x: Tensor) -> float:
    """The sum of a kernel over the pairs of a point with itself."""
    return sum(kernel(p, p).diagonal().sum().item() for p in x.split(ROWS))


def biased(kernel: Kernel, x: Tensor, y: Tensor) -> float:
    """The squared discrepancy of features (N, D) and (M, D) as sets; 0 for equal sets.

    As an estimate for their distributions it is too large by (E k(x, x) - E k(x, x')) / N, and by
    the same for y.
    """
    n, m = len(x), len(y)
    cross = total(kernel, x, y) / (n * m)
    return total(kernel, x, x) / n**2 + total(kernel, y, y) / m**2 - 2 * cross


def unbiased(kernel: Kernel, x: Tensor, y: Tensor) -> float:
    """An unbiased squared discrepancy of the distributions of (N, D) and (M, D) features.

    It may be negative.
    """
    n, m = len(x), len(y)
    within_x = (total(kernel, x, x) - diagonal(kernel, x)) / (n * (n - 1))
    within_y = (total(kernel, y, y) - diagonal(kernel, y)) / (m * (m - 1))
    return within_x + within_y - 2 * total(kernel, x, y) / (n * m)


def check_subsets(name: str, subsets: int, size: int) -> None:
    """Refuse no subsets, or subsets without pairs.

    Raises:
        MetricError: there are none.
    """
    if subsets < 1 or size < 2:
        raise MetricError(
            f"{name}: {subsets} subsets of {size}; take one subset or more, of two samples or more"
        )


def kid(
    real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased cubic discrepancy over random subsets.

    Bińkowski et al. 2018 (arXiv:1801.01401). Subsets are drawn without replacement, by `seed`.

    Raises:
        MetricError: a set has fewer than `size` points, or there are no subsets of pairs.
    """
    check_subsets("kid", subsets, size)
    if min(len(real), len(fake)) < size:
        raise MetricError(
            f"kid: {min(len(real), len(fake))} samples for subsets of {size}; give {size} or more"
        )
    rng = torch.Generator().manual_seed(seed)
    real, fake = real.double(), fake.double()
    discrepancies = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=rng)[:size]]
        y = fake[torch.randperm(len(fake), generator=rng)[:size]]
        discrepancies.append(unbiased(cubic, x, y))
    values = torch.tensor(discrepancies, dtype=torch.double)
    return values.mean().item(), values.std(unbiased=False).item()


class KID(ReservoirMetric):
    """Kernel distance to a fixed reference, with its standard deviation over subsets.

    Figures are not multiplied by 1000, unlike those of some papers.
    """

    def __init__(
        self,
        features: Features,
        reference: Tensor,
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        keep: int = 50_000,
        name: str = "kid",
    ) -> None:
        """`reference` holds uint8 images (N, C, H, W), or their features (N, D)."""
        check_subsets(name, subsets, subset_size)
        self.features, self.keep, self.name = features, keep, name
        self.subsets, self.subset_size, self.min_samples = subsets, subset_size, subset_size
        self.reference = features(reference) if reference.dim() == 4 else reference

    def measure(self, collected: Reservoir) -> dict[str, float]:
        mean, spread = kid(self.reference, collected.features, self.subsets, self.subset_size)
        return {self.name: mean, f"{self.name}_std": spread}


class CMMD(ReservoirMetric):
    """Gaussian discrepancy of CLIP embeddings, times 1000 (Jayasumana et al., arXiv:2401.09603).

    The paper's figure is the biased one. `<name>_unbiased` is given too, because the bias,
    1000 (1 - E k) / N for each set, dominates for few samples.
    """

    def __init__(
        self, features: Features, reference: Tensor, *, keep: int = 50_000, name: str = "cmmd"
    ) -> None:
        """`reference` holds uint8 images (N, C, H, W), or their features (N, D)."""
        self.features, self.keep, self.name, self.min_samples = features, keep, name, 2
        self.reference = features(reference) if reference.dim() == 4 else reference

    def measure(self, collected: Reservoir) -> dict[str, float]:
        if min(len(self.reference), len(collected.features)) < 2:
            raise MetricError(f"{self.name}: fewer than two samples; give two or more")
        x, y = (
            torch.nn.functional.normalize(f.double(), dim=1)
            for f in (self.reference, collected.features)
        )
        return {
            self.name: 1000 * biased(gaussian, x, y),
            f"{self.name}_unbiased": 1000 * unbiased(gaussian, x, y),
        }
