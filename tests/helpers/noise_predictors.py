"""Small networks that predict noise from a label, with what published codes read of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teachers.denoiser import Cond, Guided, Network
from teachers.process import Process, Tabulated

NULL = 4  # the label of no condition


class Backbone(nn.Module):
    """ε̂ (B, D) = A x_t + b_label + t c, in float64."""

    def __init__(self, seed: int, d: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        kind = {"generator": generator, "dtype": torch.float64}
        self.a = nn.Parameter(0.3 * torch.randn(d, d, **kind))
        self.b = nn.Parameter(torch.randn(NULL + 1, d, **kind))
        self.c = nn.Parameter(torch.randn(d, **kind))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond is not None
        return x_t @ self.a.T + self.b[cond["class_labels"]] + t[:, None] * self.c


def predictor(seed: int, process: Process | None = None, predicts: str = "eps") -> Network:
    """A random network of its own; it predicts noise, or whatever its process's formulas name."""
    return Network(Backbone(seed), process or Tabulated.scaled_linear(), predicts)


def guided(network: Network, scale: float) -> Guided:
    """The network with classifier-free guidance."""
    return Guided(network, scale, {"class_labels": torch.tensor([NULL])})


def labels(n: int) -> Cond:
    """The condition of n samples."""
    return {"class_labels": torch.arange(n) % NULL}
