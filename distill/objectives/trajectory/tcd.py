"""Trajectory consistency: from any time, x̂ leads to the same place at any lower one.

`TCD` is trajectory consistency distillation, Zheng et al. 2024 (arXiv:2402.19159): the edge of
PCM's phase is drawn anew for each sample, among all levels from r down. So the student may go from
any time to any lower one, and `student.gamma` says how much new noise each step adds.

Costs the same as PCM, whose critic it may have too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill.objectives.base import Learns
from distill.objectives.trajectory.pcm import PCM


@dataclass(kw_only=True)
class TCD(PCM):
    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        super(PCM, self).__post_init__()

    def edge(self, cell: Tensor) -> Tensor:
        """Any level from the cells down, each as likely."""
        share = torch.rand(len(cell), device=cell.device, dtype=torch.float64)
        return (share * (cell + 1)).long()

    def top(self, cell: Tensor) -> Tensor:
        return torch.full_like(cell, self.levels)
