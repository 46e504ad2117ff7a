"""Formulas that several objectives use.

Batches are (B, ...). Each loss is one scalar per sample, then the batch mean. Each docstring says
whether that scalar sums or averages over dimensions, because that changes the algorithm.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Games of a critic, whose logits are high for data, and a student. logistic: Goodfellow et al. 2014
# (arXiv:1406.2661), the student's loss being the non-saturating one. hinge: Lim and Ye 2017
# (arXiv:1705.02894). relativistic: R3GAN, Huang et al. 2024 (arXiv:2501.05441), between samples and
# data of equal index. least-squares: LSGAN, Mao et al. 2017 (arXiv:1611.04076), with the labels -1
# and 1.
Game = Literal["logistic", "hinge", "relativistic", "least-squares"]


def mean_square(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|² averaged over dimensions, (B,)."""
    return (x - y).square().flatten(1).mean(1)


def surrogate(x: Tensor, grad: Tensor) -> Tensor:
    """A loss whose gradient with respect to x is grad / x.numel(): ½ the mean square, as DMD2's."""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def huber(x: Tensor, y: Tensor, c: float = 0.0) -> Tensor:
    """Pseudo-Huber distance √(|x - y|² + c²) - c over the whole sample (summed), (B,).

    iCT's (arXiv:2310.14189); c = 0 is ECT's plain norm, floored so that its gradient is finite.
    """
    square = (x - y).square().flatten(1).sum(1) + c**2
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt() - c


def element_huber(x: Tensor, y: Tensor, c: float = 1e-3) -> Tensor:
    """Pseudo-Huber distance √(δ² + c²) - c of each element, averaged over dimensions, (B,).

    LCM's (arXiv:2310.04378). It is not `huber`, which is of a whole sample.
    """
    square = (x - y).square() + c**2
    return (square.clamp(min=torch.finfo(square.dtype).tiny).sqrt() - c).flatten(1).mean(1)


def generator_loss(logits: Tensor, game: Game = "logistic", real: Tensor | None = None) -> Tensor:
    """The student's loss () of the critic's logits (B,) for its samples.

    Args:
        real: The logits (B,) of data, which the relativistic game reads.
    """
    if game == "hinge":
        return -logits.mean()
    if game == "least-squares":
        return (logits - 1).square().mean()
    if game == "relativistic":
        assert real is not None
        return F.softplus(real - logits).mean()
    return F.softplus(-logits).mean()


def critic_loss(fake: Tensor, real: Tensor, game: Game = "logistic") -> Tensor:
    """The critic's loss () of its logits (B,).

    The logistic optimum is log p_real/p_fake, that of least squares (p_real - p_fake) over the sum.
    """
    if game == "hinge":
        return F.relu(1 + fake).mean() + F.relu(1 - real).mean()
    if game == "least-squares":
        return (fake + 1).square().mean() + (real - 1).square().mean()
    if game == "relativistic":
        return F.softplus(fake - real).mean()
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def mean_abs(x: Tensor) -> Tensor:
    """|x| averaged over dimensions, shaped (B, 1, ..., 1)."""
    return x.abs().flatten(1).mean(1).view(-1, *(1,) * (x.ndim - 1))


def all_sum(x: Tensor) -> Tensor:
    """x summed over processes, in place; x itself when there is only one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
