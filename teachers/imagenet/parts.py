"""Modules shared by SiT, LightningDiT and U-ViT.

Tokens are (B, T, D): the patches of an image row by row, then its columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOIDS = 256  # features of a time that SiT and LightningDiT embed


def sinusoids(t: Tensor, features: int) -> Tensor:
    """cos and sin of t (B,) at frequencies from 1 down to 10⁻⁴: (B, features), float32."""
    half = features // 2
    powers = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * powers)
    return torch.cat([angles.cos(), angles.sin()], 1)


def positions(width: int, side: int) -> Tensor:
    """The fixed embedding of side² positions, (1, side², width), computed in float64.

    The first half of the features encodes the column, the second half the row; each is the sines,
    then the cosines, of the coordinate at width/4 frequencies.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)  # of one coordinate
    columns = line[None].expand(side, -1, -1)
    rows = line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).reshape(1, side * side, width).float()


def rotation(width: int, side: int) -> Tensor:
    """Cosines and sines that rotate the channels of a head by its token's position.

    Neighbouring channels are pairs, each rotated by one angle. The first half of the pairs rotates
    by the row, the second by the column.

    Returns:
        (2, side², width), float32.
    """
    half = width // 2
    frequencies = 1 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    line = (torch.arange(side).float()[:, None] * frequencies).repeat_interleave(2, 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], 2).reshape(side * side, width)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x (..., T, width) with each pair of channels rotated; `turn` is of `rotation`."""
    across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * turn[0] + across * turn[1]).to(x.dtype)


def to_tokens(x: Tensor) -> Tensor:
    """Feature maps (B, D, H, W) as tokens (B, HW, D)."""
    return x.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, patch: int) -> Tensor:
    """An image (B, C, H, W) of patches (B, T, patch² C), square, channels last in each."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.view(len(tokens), side, side, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3)


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (B, T, D), scaled by 1 + scale and shifted; both are (B, D)."""
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


class Attention(nn.Module):
    """Self-attention of tokens.

    Args:
        bias: Of queries, keys and values.
        norm: Normalise each head's queries and keys, by this class.
    """

    def __init__(
        self, width: int, heads: int, bias: bool = True, norm: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.norm_q = nn.Identity() if norm is None else norm(width // heads)
        self.norm_k = nn.Identity() if norm is None else norm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(x.transpose(1, 2).reshape(b, n, width))


class RMSNorm(nn.Module):
    """Scaling to a root mean square of 1, in float32, then by learned weights."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """A gated layer: out(silu(a) b), with a and b from one linear layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, -1)
        return self.out(F.silu(a) * b)


def time_embedding(width: int) -> nn.Sequential:
    """From the sinusoids of a time to its embedding."""
    return nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
