"""Exact students of two times: the flow maps of data whose probability-flow ODE is solved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.analytic import Gaussian, Mixture
from teachers.denoiser import Cond, Denoiser
from teachers.process import Process, expand

D = torch.float64


class FlowMap(Denoiser):
    """x̂ of the exact jump from t to s; at s = t, which is its limit, the exact denoiser.

    Args:
        denoiser: Exact; its subclasses' `flow` gives x_s (B, ...) of x_t, t and s.
    """

    denoiser: Any

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.calls: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        self.calls.append(len(x_t))
        s = torch.zeros_like(t) if s is None else s
        same = s == t
        earlier = torch.where(same, t - 0.01, s)  # keeps 0/0 out of derivatives
        jump = self.process.end(x_t, self.flow(x_t, t, earlier), t, earlier)
        return torch.where(expand(same, x_t), self.denoiser(x_t, t), jump)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.denoiser.flow(x_t, t, s)


class MonotoneMap(FlowMap):
    """The flow map of a mixture in one dimension: quantiles are kept (monotone transport)."""

    def cdf(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution function and density of x_t (B, 1) at t (B,)."""
        mixture = self.denoiser
        alpha, sigma = self.process.at(t, x)
        std = (alpha**2 * mixture.std**2 + sigma**2).sqrt()
        place = (x - alpha * mixture.means[:, 0]) / std  # (B, K)
        cdf = torch.special.ndtr(place) @ mixture.weights[:, None]
        density = torch.exp(-place.square() / 2) / (2 * torch.pi) ** 0.5 / std
        return cdf, density @ mixture.weights[:, None]

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        mass = self.cdf(x_t, t)[0]
        with torch.no_grad():
            low, high = torch.full_like(x_t, -1e3), torch.full_like(x_t, 1e3)
            for _ in range(80):
                middle = (low + high) / 2
                below = self.cdf(middle, s)[0] < mass
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        cdf, density = self.cdf(low, s)
        return low - (cdf - mass) / density  # a Newton step, which carries the derivative


def gaussian_map(process: Process) -> FlowMap:
    """Of N(0.3, ½²), (B, 1)."""
    mean, var = torch.tensor([0.3], dtype=D), torch.tensor([0.25], dtype=D)
    return FlowMap(Gaussian(mean, var, process))


def mixture_map(process: Process) -> MonotoneMap:
    """Of two modes with unequal weights, (B, 1)."""
    means, weights = torch.tensor([[-1.0], [0.8]], dtype=D), torch.tensor([0.3, 0.7], dtype=D)
    return MonotoneMap(Mixture(means, 0.2, process, weights))


MAPS = {"gaussian": gaussian_map, "mixture": mixture_map}


class Shifted(Denoiser):
    """A student whose x̂ is another's plus a trainable constant: its gradient shows the error."""

    def __init__(self, denoiser: Denoiser, shift: float = 0.0) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.shift = torch.nn.Parameter(torch.tensor(shift, dtype=D))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        return self.denoiser(x_t, t, cond, s) + self.shift
