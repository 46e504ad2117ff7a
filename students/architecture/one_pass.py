"""One-pass students: the encoder runs once, the decoder at all times of a chain (TiUE, Loopfree).

Li et al. 2025 (arXiv:2505.21960). The decoder of each step reads what the encoder made of the noise
at the first time. So no step reads the sample of the one before it, and the chain of DDIM steps is
linear in the outputs: one call of a network (teachers/reduced/one_pass.py), one step of a student.

Differs from the paper: the times are those of DDIM's trailing grid, which begins at the last index,
and the last step leads to x̂ itself.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from teachers.errors import UserError
from teachers.families.base import Pretrained
from teachers.process import Process, Tabulated
from teachers.reduced.network import SHARES, TIMES

KEY = "student.architecture.decoder_times"


def decoder_settings(network: Pretrained, count: int) -> dict[str, Any]:
    """The keys that make a UNet's config a one-pass network's, whose decoder runs `count` times.

    Raises:
        UserError: it is no such UNet, its noise has no indices, or `count` does not divide them.
    """
    backbone, process = network.backbone, network.process
    if not isinstance(backbone, UNet2DConditionModel) or TIMES in backbone.config:
        raise UserError(
            f"{KEY}: a {type(backbone).__name__} is no UNet2DConditionModel of diffusers, whose "
            "halves can run apart; leave it out"
        )
    if not isinstance(process, Tabulated):
        raise UserError(f"{KEY}: the teacher's noise has no indices of DDIM's; leave it out")
    if (process.last + 1) % count:
        raise UserError(
            f"{KEY}: {count} does not divide the {process.last + 1} indices of the teacher's "
            "scheduler; give a count that does"
        )
    indices = [(process.last + 1) * (count - k) // count - 1 for k in range(count)]
    times = torch.tensor(indices, dtype=torch.float64) / process.last
    return {
        TIMES: network.time(times).tolist(),
        SHARES: shares(process, network.coefficients, times.tolist()),
    }


def shares(process: Process, predicts: Any, times: list[float]) -> list[float]:
    """The shares (1 + N) of the input and of N outputs in one output at the first time, from which
    follows the x̂ that N steps of DDIM at these times end with.

    Args:
        predicts: α, σ -> c_skip, c_out of the outputs.
    """
    chain = torch.tensor(times, dtype=torch.float64)
    skip, out = predicts(*process.scales(chain))
    units = torch.eye(1 + len(times), dtype=torch.float64)  # of the input, and of each output
    x_t = units[:1]
    for k in range(len(times)):
        x = skip[k] * x_t + out[k] * units[k + 1 : k + 2]
        if k + 1 < len(times):
            x_t = process.step(x_t, x, chain[k : k + 1], chain[k + 1 : k + 2])
    return ((x - skip[0] * units[:1]) / out[0])[0].tolist()  # pyright: ignore
