"""Weights of the squared error of x̂ by noise level: what another prediction's loss would weigh.

With SNR = (α/σ)², an error of x̂ is worth (on a variance-preserving process, which a weight by
noise level means whatever the process is):

| weighting | of |Δx̂|² | is |
|---|---|---|
| `x` | 1 | the loss of x̂ |
| `eps` | SNR | the loss of ε |
| `v` | SNR + 1 | the loss of v (arXiv:2202.00512) |
| `flow` | (1 + α/σ)² | the loss of a rectified flow's velocity (arXiv:2209.03003) |
| `min-snr` | min(SNR, γ) | Min-SNR-γ (arXiv:2303.09556) |
| `truncated-snr` | max(SNR, 1) | the opposite: progressive distillation's (arXiv:2202.00512) |
| `sigmoid` | SNR sigmoid(b - log SNR) | on ε monotone in t, so an ELBO (arXiv:2303.00848) |

The last is an ELBO with data augmentation if log SNR is drawn evenly; draws of another density
multiply its weight by that density.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from teachers.process import Process

Weighting = Literal["x", "eps", "v", "flow", "min-snr", "truncated-snr", "sigmoid"]


def error_weight(
    weighting: Weighting, process: Process, t: Tensor, gamma: float = 5.0, bias: float = 2.0
) -> Tensor:
    """The weight (B,) of |Δx̂|² at t (B,), in t's type.

    Args:
        gamma: Of `min-snr`: the greatest weight.
        bias: Of `sigmoid`: the log SNR at which a prediction of ε has half of its weight.
    """
    alpha, sigma = process.scales(t.double())
    ratio = alpha / sigma
    snr = ratio.square()
    weights = {
        "x": torch.ones_like(snr),
        "eps": snr,
        "v": snr + 1,
        "flow": (1 + ratio).square(),
        "min-snr": snr.clamp(max=gamma),
        "truncated-snr": snr.clamp(min=1),
        "sigmoid": snr * torch.sigmoid(bias - snr.log()),
    }
    return weights[weighting].to(t.dtype)
