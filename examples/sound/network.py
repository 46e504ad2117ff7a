"""A small 1-D U-Net for short sounds. It needs torch alone, so it travels with its students."""

import math

import torch
from torch import Tensor, nn

PATCH = 8  # samples of sound that become channels, so that the first layers are cheap


class Block(nn.Module):
    """Two convolutions with a residual, told the time and the label by a scale and a shift."""

    def __init__(self, inner: int, outer: int, told: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1 = nn.Conv1d(inner, outer, 5, padding=2)
        self.conv2 = nn.Conv1d(outer, outer, 5, padding=2)
        self.told = nn.Linear(told, 2 * outer)
        self.skip = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        scale, shift = self.told(told)[..., None].chunk(2, 1)
        h = self.conv2(nn.functional.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class SoundNet(nn.Module):
    """The velocity ε - x of sounds x_t (B, 1, L) at times t (B,) in [0, 1], for labels (B,).

    Args:
        widths: Channels at each of the scales; L must be a multiple of 8 · 2^(scales - 1).
        classes: How many labels there are; the label `classes` means none.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 48, 64), classes: int = 4) -> None:
        super().__init__()
        self.widths, self.classes = tuple(widths), classes
        told = 64
        self.time = nn.Sequential(nn.Linear(64, told), nn.SiLU(), nn.Linear(told, told))
        self.label = nn.Embedding(classes + 1, told)
        self.first = nn.Conv1d(PATCH, widths[0], 5, padding=2)
        pairs = [(widths[max(i - 1, 0)], w) for i, w in enumerate(widths)]
        self.down = nn.ModuleList(Block(a, b, told) for a, b in pairs)
        self.middle = Block(widths[-1], widths[-1], told)
        self.up = nn.ModuleList(Block(2 * b, a, told) for a, b in reversed(pairs))
        self.last = nn.Conv1d(widths[0], PATCH, 5, padding=2)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        angle = t[:, None] * math.pi * torch.linspace(0, 5, 32, device=t.device).exp2()
        told = self.time(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        none = torch.full((len(x),), self.classes, device=x.device)
        told = told + self.label(none if cond is None else cond["class_labels"])
        h = self.first(x.unflatten(-1, (-1, PATCH))[:, 0].transpose(1, 2))
        kept = []
        for i, block in enumerate(self.down):
            h = block(nn.functional.avg_pool1d(h, 2) if i else h, told)
            kept.append(h)
        h = self.middle(h, told)
        for i, block in enumerate(self.up):
            h = block(torch.cat([h, kept.pop()], 1), told)
            h = h.repeat_interleave(2, -1) if i < len(self.up) - 1 else h
        return self.last(h).transpose(1, 2).flatten(1)[:, None]
