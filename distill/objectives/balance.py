"""Weights that balance the terms of a loss by their gradients at the network's last layer.

Esser et al. 2020 (arXiv:2012.09841); CTM uses them for its denoising and its adversarial term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachers.denoiser import Denoiser


def last_layer(denoiser: Denoiser) -> Tensor:
    """The last matrix that learns in a network, or its last weight where there is none.

    Of a network that another one wraps, it is the wrapped one's.
    """
    network = denoiser.inner_denoiser or denoiser
    weights = [p for p in network.parameters() if p.requires_grad]
    return next((p for p in reversed(weights) if p.ndim > 1), weights[-1])


def balance(main: Tensor, other: Tensor, weight: Tensor, low: float, high: float) -> Tensor:
    """|∇ main| / (|∇ other| + 1e-4) in [low, high], of two losses at a weight; a constant ()."""
    norms = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (main, other)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(low, high).detach()
