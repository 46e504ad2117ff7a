"""Directional derivatives of a network: d/dε f(x + ε v) at ε = 0, without gradients of their own.

Continuous-time consistency and flow-map objectives use them (sCM, arXiv:2410.11081; MeanFlow,
arXiv:2505.13447). There are several methods, since not every kernel has a forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.compiled import running_eagerly

How = Literal["forward", "difference", "stacked", "central"]


def tangent(
    f: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    how: How = "forward",
    step: float = 1e-3,
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """f at the primals, and its derivative along the tangents.

    Each method evaluates f once for the value and once for the derivative, twice for "central",
    and with a graph no more than that: a loss takes the value's gradient without calling f again.

    Args:
        f: Of tensors that share their first dimension, to a tensor (B, ...).
        primals: The point, each (B, ...).
        tangents: The direction, each shaped like its primal.
        how: "forward" is exact: forward-mode differentiation, attention by its formula and autocast
            off, since fused attention and autocast have no forward mode. "difference" is
            (f(x + step v) - f(x)) / step, in two calls, and "stacked" the same in one call of twice
            the batch, for an f that treats samples independently. "central" is
            (f(x + step v) - f(x - step v)) / (2 step), whose error falls with the step squared.
        step: Of the differences; a smaller one is more exact down to about √eps of the dtype.
        graph: Whether the value keeps its graph, so that gradients to weights go through it. The
            derivative never has one; "forward" frees the derivative's graph when it returns, and
            "stacked" carries gradients of zero through the second half of its batch.

    Raises:
        ValueError: the tangents do not match the primals.
    """
    if [p.shape for p in primals] != [v.shape for v in tangents]:
        raise ValueError("tangents: give one for each primal, of its shape")
    with torch.set_grad_enabled(graph):
        if how == "forward":
            with exactly(primals[0].device.type):
                value, slope = _dual(f, primals, tangents) if graph else _jvp(f, primals, tangents)
            return value, slope.detach()
        ahead = tuple(p + step * v for p, v in zip(primals, tangents, strict=True))
        if how == "central":
            value = f(*primals)
            behind = tuple(p - step * v for p, v in zip(primals, tangents, strict=True))
            with torch.no_grad():
                return value, (f(*ahead) - f(*behind)) / (2 * step)
        if how == "difference":
            value = f(*primals)
            with torch.no_grad():
                other = f(*ahead)
        else:
            both = f(*(torch.cat(pair) for pair in zip(primals, ahead, strict=True)))
            value, other = both.chunk(2)
        return value, ((other - value) / step).detach()


@contextmanager
def exactly(kind: str) -> Iterator[None]:
    """Inside it, networks on this kind of device run only code that has a forward mode."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(kind, enabled=False), running_eagerly():
        yield


def _jvp(f: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    return torch.func.jvp(f, primals, tangents)[:2]


def _dual(f: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    """As `_jvp`, with graphs; activation checkpointing knows these dual numbers.

    Tensors that leave the level lose their tangents, which therefore are copied inside it.
    """
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)))
        value, slope = forward_ad.unpack_dual(out)
        slope = torch.zeros_like(value) if slope is None else slope.detach().clone()
    return value, slope
