"""Convolutions in the place of self-attention.

ΔConvFusion, 2025 (arXiv:2504.21292): what self-attention does in a UNet is a local pattern and a
mean over the picture. The local pattern is the sum of gated depthwise convolutions at several
resolutions. Where the output projection sits is not stated; here it follows the sum.

Weights begin so that the layer is the attention whose map is uniform: the mean goes through the
attention's own value and output projections, and the sum through a projection of zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F


class Pyramid(nn.Module):
    """Tokens (B, N, C) of a square picture to (B, N, C).

    Args:
        channels: C.
        stages: n: stage i = 1 to n works at 2^-i of the resolution, with C/2n channels that become
            half as many as gates and values are multiplied.
    """

    def __init__(self, channels: int, stages: int) -> None:
        super().__init__()
        half = max(1, channels // (4 * stages))
        self.into = nn.Conv2d(channels, 2 * half, 1)
        self.stages = nn.ModuleList(
            nn.Conv2d(2 * half, 2 * half, 3, padding=1, groups=2 * half) for _ in range(stages)
        )
        self.out = nn.Conv2d(half, channels, 1)
        self.mean = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        b, n, c = hidden_states.shape
        side = math.isqrt(n)
        if side * side != n:
            raise ValueError(f"a pyramid is for square pictures, and {n} tokens are none")
        x = hidden_states.transpose(1, 2).reshape(b, c, side, side)
        narrow = self.into(x)
        parts = [
            upsampled(gated(stage(pooled(narrow, 2**i))), side)
            for i, stage in enumerate(self.stages, 1)
        ]
        whole = self.mean(x.mean((2, 3), keepdim=True))
        out = self.out(torch.stack(parts).sum(0)) + whole
        return out.flatten(2).transpose(1, 2)


def pooled(x: Tensor, factor: int) -> Tensor:
    """Means over squares of so many places (B, C, H, W); at the edge over those that there are."""
    factor = min(factor, x.shape[-1])
    return F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def upsampled(x: Tensor, side: int) -> Tensor:
    """Bilinear values at (side, side)."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def gated(f: Tensor) -> Tensor:
    """The first half of the C channels times the second, over √C: (B, C/2, H, W).

    Of independent numbers of deviation 1 it has deviation 1/√C.
    """
    first, second = f.chunk(2, 1)
    return first * second / f.shape[1] ** 0.5


def pyramid(layer: Attention, stages: int = 2) -> Pyramid:
    """Convolutions in the place of a self-attention inside a transformer's block.

    Raises:
        ValueError: it is no such attention, or these are no stages.
    """
    outer = ("residual_connection", "group_norm", "spatial_norm", "is_cross_attention")
    if not isinstance(layer, Attention) or any(getattr(layer, name) for name in outer):
        raise ValueError("give a self-attention of a transformer's block, such as one named attn1")
    if not isinstance(stages, int) or isinstance(stages, bool) or not 1 <= stages <= 6:
        raise ValueError("stages: give 1 to 6")
    whole: Any = layer
    value, last = whole.to_v, whole.to_out[0]
    made = Pyramid(layer.query_dim, stages).to(last.weight)
    with torch.no_grad():
        weight = last.weight @ value.weight / layer.rescale_output_factor
        bias = weight.new_zeros(len(weight)) if last.bias is None else last.bias.clone()
        if value.bias is not None:
            bias += last.weight @ value.bias
        made.mean.weight.copy_(weight[:, :, None, None])
        made.mean.bias.copy_(bias / layer.rescale_output_factor)  # pyright: ignore
        for p in made.out.parameters():
            p.zero_()
    return made
