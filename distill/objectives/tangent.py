"""Directional derivatives of a network: d/dε f(x + ε v) at ε = 0, without gradients to weights.

Continuous-time consistency and flow-map objectives use them (sCM, arXiv:2410.11081; MeanFlow,
arXiv:2505.13447). There are three methods, since not every kernel has a forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.compiled import running_eagerly

How = Literal["forward", "difference", "stacked"]


def tangent(
    f: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    how: How = "forward",
    step: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """f at the primals, and its derivative along the tangents; both without gradients.

    Args:
        f: Of tensors that share their first dimension, to a tensor (B, ...).
        primals: The point, each (B, ...).
        tangents: The direction, each shaped like its primal.
        how: "forward" is exact: forward-mode differentiation, attention by its formula and autocast
            off, since fused attention and autocast have no forward mode. "difference" is
            (f(x + step v) - f(x)) / step, in two calls, and "stacked" the same in one call of twice
            the batch, for an f that treats samples independently.
        step: Of the differences; a smaller one is more exact down to about √eps of the dtype.

    Raises:
        ValueError: the tangents do not match the primals.
    """
    if [p.shape for p in primals] != [v.shape for v in tangents]:
        raise ValueError("tangents: give one for each primal, of its shape")
    with torch.no_grad():
        if how == "forward":
            kind = primals[0].device.type
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast(kind, enabled=False),
                running_eagerly(),
            ):
                value, slope = torch.func.jvp(f, primals, tangents)[:2]
            return value, slope
        ahead = tuple(p + step * v for p, v in zip(primals, tangents, strict=True))
        if how == "difference":
            value, other = f(*primals), f(*ahead)
        else:
            both = f(*(torch.cat(pair) for pair in zip(primals, ahead, strict=True)))
            value, other = both.chunk(2)
        return value, (other - value) / step
