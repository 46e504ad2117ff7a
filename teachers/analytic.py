"""Teachers in closed form: exact denoisers to test objectives against, and to learn from.

Each computes E[x | x_t] without a network; x is (B, D) for mixtures and (B, ...) for a data set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teachers.denoiser import Cond, Denoiser
from teachers.process import Karras, Process, expand


class Gaussian(Denoiser):
    """The exact denoiser of N(mean, cov): x̂ = m + α C (α² C + σ²)⁻¹ (x_t - α m).

    Args:
        mean: (D,).
        cov: (D, D), or (D,) for its diagonal.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    def __init__(self, mean: Tensor, cov: Tensor, process: Process | None = None) -> None:
        super().__init__()
        self.process = process or Karras()
        values, vectors = torch.linalg.eigh(cov if cov.ndim == 2 else torch.diag(cov))
        self.register_buffer("mean", mean)
        self.register_buffer("values", values.clamp(min=0))
        self.register_buffer("vectors", vectors)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.at(t, x_t)
        gain = alpha * self.values / (alpha**2 * self.values + sigma**2)  # (B, D), eigenbasis
        return self.mean + (gain * ((x_t - alpha * self.mean) @ self.vectors)) @ self.vectors.T

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s: the probability-flow ODE solved exactly from x_t, in the eigenbasis of cov."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.process.at(t, x_t), self.process.at(s, x_t)
        std_t = (alpha_t**2 * self.values + sigma_t**2).sqrt()
        std_s = (alpha_s**2 * self.values + sigma_s**2).sqrt()
        inner = (x_t - alpha_t * self.mean) @ self.vectors
        return alpha_s * self.mean + (std_s / std_t * inner) @ self.vectors.T

    def sample(self, n: int) -> Tensor:
        """n exact draws of the data, shaped (n, D)."""
        z = torch.randn(n, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (self.values.sqrt() * z) @ self.vectors.T


class Mixture(Denoiser):
    """The exact denoiser of a mixture of N(mean_k, std² I).

    Args:
        means: (K, D).
        std: Of every component.
        weights: (K,), summing to 1; equal by default.
    """

    means: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Tensor,
        std: float,
        process: Process | None = None,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.std, self.process = std, process or Karras()
        self.register_buffer("means", means)
        if weights is None:
            weights = means.new_full((len(means),), 1 / len(means))
        self.register_buffer("weights", weights)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.at(t, x_t)
        var = (alpha * self.std) ** 2 + sigma**2  # of x_t around α mean_k
        gap = x_t[:, None] - alpha[:, None] * self.means  # (B, K, D)
        posterior = torch.softmax(
            self.weights.log() - gap.square().sum(-1) / (2 * var), dim=1
        )  # (B, K)
        mean = self.means + (alpha * self.std**2 / var)[:, None] * gap
        return (posterior[..., None] * mean).sum(1)

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sample(self, n: int) -> Tensor:
        """n exact draws of the data, shaped (n, D)."""
        k = torch.multinomial(self.weights, n, replacement=True)
        return self.means[k] + self.std * torch.randn(
            n, self.means.shape[1], dtype=self.means.dtype, device=self.means.device
        )


class Finite(Denoiser):
    """The exact denoiser of a finite data set: the posterior mean over its items.

    Args:
        items: (N, ...).
        labels: (N,) int64; with cond["class_labels"], only items of that class count.
    """

    items: Tensor
    labels: Tensor | None

    def __init__(
        self, items: Tensor, labels: Tensor | None = None, process: Process | None = None
    ) -> None:
        super().__init__()
        self.process = process or Karras()
        self.register_buffer("items", items)
        self.register_buffer("labels", labels)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.scales(t)
        flat, data = x_t.flatten(1), self.items.flatten(1)
        # |x_t - αx|² up to a term that all items share
        gap = alpha[:, None] ** 2 * data.square().sum(1) - 2 * alpha[:, None] * flat @ data.T
        logits = -gap / (2 * expand(sigma, flat) ** 2)
        if self.labels is not None and cond is not None:
            logits = logits.masked_fill(
                cond["class_labels"][:, None] != self.labels[None], -math.inf
            )
        return (torch.softmax(logits, 1) @ data).view_as(x_t)

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


def ring(n: int = 8, radius: float = 2.0) -> Tensor:
    """n points on a circle, shaped (n, 2)."""
    angle = torch.arange(n) * 2 * math.pi / n
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


# `load("analytic:NAME")` makes these, each with the shape of one sample.
ANALYTIC = {
    "gaussian": lambda: Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 0.6]])),
    "ring": lambda: Mixture(ring(), 0.12),
    "two-modes": lambda: Mixture(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), 1.0),
}
