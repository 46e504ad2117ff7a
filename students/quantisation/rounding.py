"""Rounding of weights and activations to b bits, as integer hardware would compute with them.

Weights are symmetric with one scale for each output, from their largest value; activations have
one scale and one zero for a tensor, from the range that calibration saw. So MixDQ has them, Zhao et
al. 2024 (arXiv:2405.17873). Values stay in floating point: what is computed is exact, and no
faster. 16 bits leave a value as it is. Within a step Δ an error is even, so its square is Δ²/12.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WHOLE = 16  # bits of what is not rounded

Range = tuple[float, float]


def rounded_weight(weight: Tensor, bits: int, split: int = 0) -> Tensor:
    """A weight (out, in, ...) rounded to the integers ±(2^(b-1) - 1) times a scale of its output.

    Args:
        split: Inputs before this one, and those from it on, have scales of their own; 0 for one.
    """
    if bits >= WHOLE:
        return weight
    if split:
        halves = (weight[:, :split], weight[:, split:])
        return torch.cat([rounded_weight(v, bits) for v in halves], 1)
    largest = 2 ** (bits - 1) - 1
    scale = weight.detach().abs().flatten(1).amax(1) / largest
    scale = scale.clamp(min=torch.finfo(weight.dtype).tiny).reshape(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-largest, largest) * scale


def straight_through(weight: Tensor, bits: int, split: int = 0) -> Tensor:
    """`rounded_weight`, through which gradients pass as if it were not there."""
    return weight + (rounded_weight(weight, bits, split) - weight).detach()


def rounded_activation(
    x: Tensor, bits: int, ranges: Sequence[Range], split: int = 0, axis: int = -1
) -> Tensor:
    """x rounded to 2^b even levels over a range that holds 0; values beyond it are clamped.

    Args:
        ranges: Lowest and highest value, of each half where there are two.
        split: Features before this one, and those from it on, have ranges of their own; 0 for one.
        axis: Of the features.
    """
    if bits >= WHOLE:
        return x
    if split:
        halves = x.split([split, x.shape[axis] - split], axis)
        return torch.cat(
            [rounded_activation(v, bits, [r]) for v, r in zip(halves, ranges, strict=True)], axis
        )
    low, high = min(ranges[0][0], 0.0), max(ranges[0][1], 0.0)
    levels = 2**bits - 1
    scale = max((high - low) / levels, torch.finfo(torch.float32).tiny)
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, levels).sub(zero) * scale
