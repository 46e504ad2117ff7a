"""Modules shared by EDM's and EDM2's networks (arXiv:2206.00364, arXiv:2312.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def precise(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is already."""
    return x if x.dtype == torch.float64 else x.float()


def one_hot(labels: Tensor | None, classes: int, x: Tensor) -> Tensor:
    """One-hot rows (B, classes) in x's dtype; None and the label `classes` give rows of zeros."""
    if labels is None:
        return x.new_zeros(len(x), classes)
    return F.one_hot(labels.long(), classes + 1)[:, :classes].to(x.dtype)


class Resample(nn.Module):
    """Resampling by 2 or ½ with a separable filter, each channel separately.

    Args:
        taps: The filter, of even length; [1, 1] averages, or repeats.
        up: Double the size; else halve it.
        pad: Padding at each side; by default the one that keeps the image in place.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float], up: bool, pad: int | None = None) -> None:
        super().__init__()
        row = torch.tensor(taps, dtype=torch.float32, device="cpu")
        kernel = torch.outer(row, row) / row.sum() ** 2
        self.register_buffer("kernel", 4 * kernel if up else kernel, persistent=False)
        self.pad = (len(taps) - 1) // 2 if pad is None else pad
        self.convolve = F.conv_transpose2d if up else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        weight = self.kernel.to(x.dtype).expand(c, 1, -1, -1)
        return self.convolve(x, weight, stride=2, padding=self.pad, groups=c)


class Stage(nn.Module):
    """The blocks of one resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.resize: nn.Module | None = None
        self.side: nn.Module | None = None
        self.middle, self.blocks = nn.ModuleList(), nn.ModuleList()


def stages(named: nn.ModuleDict) -> dict[str, Stage]:
    """The stages by resolution, in running order."""
    return cast("dict[str, Stage]", named)
