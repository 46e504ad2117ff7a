"""MMD: the student's samples and data have the same mean features under a kernel.

MMD-DDM, Aiello et al. 2023 (arXiv:2301.07969): the unbiased squared maximum mean discrepancy of
features of a frozen network is the loss, and gradients reach the samples through that network.
With the Gaussian kernel it is the comparison of RDM (Feng et al. 2026), a distance on features as
they are. Costs, besides the student's pass, one of the teacher with gradients and one without; they
end at the last block that is read.

The estimate is Gretton's paired one: over pairs i ≠ j, of k(f_i, f_j) + k(r_i, r_j) - k(f_i, r_j) -
k(f_j, r_i). f_i and r_i share their condition, so the pair (i, i) would make it biased. Being
unbiased, its mean over parts of a batch, and so over processes, is an estimate of the same loss.

Differs from the authors' code: features are the frozen teacher's, not CLIP's; the student starts
from the teacher's weights and renoises as other students here do, where theirs is a DDIM chain. By
default gradients pass the last step only (`gradient: chain` is theirs). With `by_label`, samples
and labels are compared together. RDM's landmarks, its balance of encoders and its biased estimate
are not here, and the Gaussian kernel's σ follows the batch, where theirs is found once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.field_types import Positive
from distill.objectives.base import Batch, Loss
from distill.objectives.features.base import FeatureMatching, others, squared_distances
from students.generator import Generator

Kernel = Literal["cubic", "linear", "gaussian"]


@dataclass(kw_only=True)
class MMD(FeatureMatching):
    kernel: Kernel = "cubic"  # KID's (x·y / D + 1)³; x·y / D; or exp(-|x - y|² / 2σ²)
    # Of the Gaussian kernel: σ over the median distance between points of a batch, samples and data
    # alike: a distance of data alone would make the estimate biased.
    bandwidth: Positive = 1.0
    by_label: bool = False  # whether pairs of different class labels have a kernel of 0

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        x, fakes = self.read(batch, student, first)
        with torch.no_grad():
            real = self.features(batch.data, batch.cond)
        pairs = others(batch.cond, len(x), x.device, self.by_label)
        squares = [self.discrepancy(f, r, pairs) for f, r in zip(fakes, real, strict=True)]
        logs = {f"mmd{i}": v.detach() for i, v in enumerate(squares)} if len(squares) > 1 else {}
        return Loss(torch.stack(squares).sum(), logs, x)

    def discrepancy(self, fake: Tensor, real: Tensor, pairs: Tensor) -> Tensor:
        """The unbiased squared discrepancy () of features (B, D); it can be negative.

        Args:
            real: Held fixed.
            pairs: (B, B), symmetric: which pairs count. The mean is over all i ≠ j.
        """
        size, sigma = len(fake), None
        if self.kernel == "gaussian":
            sigma = self.bandwidth * median_distance(torch.cat([fake.detach(), real]))
        within, data, across = (
            (kernel(self.kernel, a, b, sigma) * pairs).sum() / (size * (size - 1))
            for a, b in ((fake, fake), (real, real), (fake, real))
        )
        return within + data - 2 * across


def kernel(name: Kernel, x: Tensor, y: Tensor, sigma: Tensor | None = None) -> Tensor:
    """The kernel of features (N, D) and (M, D), (N, M).

    Args:
        sigma: (), the Gaussian kernel's.
    """
    if name == "gaussian":
        assert sigma is not None
        return torch.exp(-squared_distances(x, y) / (2 * sigma**2))
    product = x @ y.T / x.shape[1]
    return product if name == "linear" else (product + 1) ** 3


def median_distance(x: Tensor) -> Tensor:
    """The root of the median of |x_i - x_j|², i ≠ j, of features (N, D); (), not 0."""
    rows, columns = torch.triu_indices(len(x), len(x), 1, device=x.device)
    square = squared_distances(x, x)[rows, columns].median()
    return square.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
