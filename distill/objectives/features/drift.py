"""Drifting in the teacher's features: samples move to data near them and away from each other.

Teacher-feature drifting, Zhang et al. 2026 (arXiv:2605.07327). Each sample z moves by V(z), a
softmax-weighted mean of data near it less one of other samples near it, at several radii; the loss
is the square of the step, with z + V held fixed, and gradients reach the student through the frozen
teacher. Costs, besides the student's pass, one of the teacher with gradients and one without; they
end at the last block that is read.

A group of N samples and M data has a field that vanishes on average, where both have one
distribution, only if M = N - 1: a sample is compared with N - 1 others. Otherwise it points outward
and the student gets too wide. The datum at a sample's own place, which has its condition, is
therefore left out (`data: others`; `all` is the papers' with M = N).

Differs from the paper, known in part from others' code: groups are the samples of one class label
in a batch, or all of it; the radii are in units of the mean distance between data of a group; the
field is of each block by itself, with features divided by that distance; the term of coverage is
not here. Radii near zero make a softmax of one neighbour: `neighbours` logs how many it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.field_types import Positive, PositiveInt
from distill.objectives.base import Batch, Loss
from distill.objectives.features.base import FeatureMatching, others, squared_distances
from students.generator import Generator
from teachers.errors import UserError


@dataclass(kw_only=True)
class Drift(FeatureMatching):
    pool: PositiveInt = 4  # cells, along each side, that a feature map is averaged over
    radii: tuple[Positive, ...] = (0.02, 0.05, 0.2)  # in units of the mean distance between data
    data: Literal["others", "all"] = "others"  # of a group: without a sample's own datum, or with
    by_label: bool = True  # whether class-conditional samples move within their label

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radii:
            raise UserError("objective.radii: it is empty; name at least one radius")

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        x, features = self.read(batch, student, first)
        with torch.no_grad():
            real = self.features(batch.data, batch.cond)
        pairs = others(batch.cond, len(x), x.device, self.by_label)
        losses, lengths, neighbours = [], [], []
        for z, r in zip(features, real, strict=True):
            scale = mean_distance(r, pairs)
            z, r = z / scale, r / scale
            with torch.no_grad():
                field, near = self.field(z, r, pairs)
            losses.append((z - (z + field).detach()).square().mean())
            lengths.append(field.norm(dim=1).mean())
            neighbours.append(near)
        logs = {"drift": torch.stack(lengths).mean(), "neighbours": torch.stack(neighbours).mean()}
        return Loss(torch.stack(losses).sum(), logs, x)

    def field(self, z: Tensor, real: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """V (B, D) of features z and data (B, D), and the effective neighbours () of a radius.

        Args:
            pairs: (B, B), the other members of each sample's group. One without any stays.
        """
        group = pairs.clone()
        if self.data == "all":
            group.fill_diagonal_(True)
        apart, away = (squared_distances(z, v).sqrt() for v in (z, real))
        total, near = torch.zeros_like(z), []
        for radius in self.radii:
            pull = weights(away, group, radius)
            total = total + pull @ real - weights(apart, pairs, radius) @ z
            near.append(1 / pull.square().sum(1).clamp(min=1 / len(z)))
        alone = ~pairs.any(1, keepdim=True)
        field = torch.where(alone, torch.zeros_like(total), total / len(self.radii))
        return field, torch.stack(near).amin(0).mean()


def weights(distances: Tensor, pairs: Tensor, radius: float) -> Tensor:
    """softmax(-distance / radius) over the pairs of each row, (B, B); 0 in a row of none."""
    logits = (-distances / radius).masked_fill(~pairs, -torch.inf)
    return torch.nan_to_num(logits.softmax(1))


def mean_distance(x: Tensor, pairs: Tensor) -> Tensor:
    """The mean distance () of features (B, D) over pairs; 1 where there is none to go by."""
    mean = (squared_distances(x, x).sqrt() * pairs).sum() / pairs.sum().clamp(min=1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))
