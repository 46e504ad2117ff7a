"""A process in the coordinates of a rectified flow, in which flow maps are written.

With τ = σ/(α + σ), the state z = x_t/(α + σ) is (1 - τ) x + τ ε. So z has the velocity ε - x, and
x̂ = z - τ u of an average velocity u from τ to any earlier time. Here τ is the flow time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teachers.process import Process


class FlowTime(NamedTuple):
    """The flow time τ at process times (B,), and its derivative; float64 (B,)."""

    tau: Tensor
    rate: Tensor  # dτ/dt


def flow_time(process: Process, t: Tensor) -> FlowTime:
    """τ and dτ/dt at t (B,)."""
    t64 = t.double().clone()  # an expanded tensor cannot carry a tangent
    scales, slopes = torch.func.jvp(process.scales, (t64,), (torch.ones_like(t64),))[:2]
    (alpha, sigma), (d_alpha, d_sigma) = scales, slopes
    total = alpha + sigma
    return FlowTime(sigma / total, (alpha * d_sigma - sigma * d_alpha) / total**2)


def process_time(process: Process, tau: Tensor) -> Tensor:
    """The t in [0, 1] whose flow time is tau (B,); float64."""
    tau = tau.double()
    return process.time(tau / (1 - tau)).clamp(0, 1)
