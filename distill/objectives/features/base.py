"""What objectives of frozen features share: the student's samples, and the features of them.

The features are outputs of the frozen teacher's blocks at a low noise level, one step of training
for each place of the student's chain. Gradients pass through the teacher to the samples. Protocols
measure with networks of their own, so no figure is computed from the features that were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.field_types import NonNegative, PositiveInt
from distill.objectives.base import Batch, Loss, Objective, Turn
from students.critic import channels_first, image_stream
from students.generator import Generator
from teachers.conditions import rows
from teachers.denoiser import Cond, Denoiser, Guided
from teachers.errors import UserError
from teachers.features import blocks_of, tapped

KEY = "objective.blocks"  # which begins error messages
LABELS = "class_labels"  # the condition of class-conditional networks


@dataclass(kw_only=True)
class FeatureMatching(Objective):
    # Names of the teacher's blocks, each with a loss of its own; none: the samples themselves.
    blocks: tuple[str, ...] = ("backbone.mid_block",)
    noise_level: NonNegative = 0.1  # σ/α of the noise on what the teacher reads
    pool: PositiveInt = 1  # cells, along each side, that a feature map is averaged over
    # What gradients reach: the last of the steps that were taken, and each step has its turn to be
    # the last; or all of the chain.
    gradient: Literal["last", "chain"] = "last"
    # How many parts of a batch take their samples and features anew for the gradient, one after the
    # other: the loss is the whole batch's, and the memory that of a part (gradient caching).
    parts: PositiveInt = 1

    def __post_init__(self) -> None:
        blocks_of(self.teacher, self.blocks, KEY)
        if repeated := [b for b in self.blocks if self.blocks.count(b) > 1]:
            raise UserError(f"{KEY}: {repeated[0]!r} is there twice; name each block once")

    @property
    def loss_features(self) -> str:
        names = ", ".join(self.blocks)
        level = f"with noise of σ/α = {self.noise_level:g}"
        return f"teacher's {names} {level}" if names else "the samples' own values"

    def check_batch(self, shape: tuple[int, ...]) -> None:
        if shape[0] < 2:
            raise UserError(
                "train.batch: a part of it has one sample, which is no distribution; give each "
                "part more by train.batch or train.accumulate"
            )

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        yield Turn(("student",), partial(self.student_loss, student=student, first=first))

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The loss of a batch, of a student at one of its counts and a place of its chain."""
        raise NotImplementedError

    def samples(self, batch: Batch, student: Generator, first: int) -> Tensor:
        """x̂ (B, ...) with its graph: of place `first`, or of the whole chain's end."""
        if self.gradient == "chain":
            return student(batch.noise, batch.cond, whole_chain=True)
        return student(batch.noise, batch.cond, first + 1)

    def read(self, batch: Batch, student: Generator, first: int) -> tuple[Tensor, list[Tensor]]:
        """x̂ (B, ...) and its features (B, D) at each block, with their graph, in `parts`."""

        def taken(noise: Tensor, cond: Cond) -> tuple[Tensor, ...]:
            x = self.samples(Batch(None, noise, cond), student, first)
            return x, *self.features(x, cond)

        if self.parts == 1:
            x, *features = taken(batch.noise, batch.cond)
            return x, features
        pieces = [
            checkpoint(taken, batch.noise[index], rows(batch.cond, index), use_reentrant=False)
            for index in torch.arange(len(batch.noise), device=batch.noise.device).chunk(self.parts)
        ]
        x, *features = map(torch.cat, zip(*pieces, strict=True))
        return x, features

    def features(self, x: Tensor, cond: Cond) -> list[Tensor]:
        """Features (B, D) of clean x (B, ...) at each block, in float32 or wider; with a graph."""
        if not self.blocks:
            return [widened(x.flatten(1))]
        process = self.teacher.process
        ratio = x.new_full((len(x),), self.noise_level, dtype=torch.float64)
        t = process.time(ratio).clamp(0, 1).to(torch.promote_types(x.dtype, torch.float32))
        outputs = self.outputs(process.noise(x, t, torch.randn_like(x)), t, cond)
        return [widened(f) for f in outputs]

    @property
    def unguided(self) -> Denoiser:
        """The teacher's network, whose features cost one evaluation with any guidance."""
        network = self.teacher
        while isinstance(network, Guided):
            network = network.denoiser
        return network

    def outputs(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The blocks' outputs (B, D), averaged over cells or tokens."""
        network = self.unguided
        with tapped(network, self.blocks, KEY, stop=True) as outputs:
            network(x_t, t, cond)
        modules = blocks_of(network, self.blocks, KEY)
        return [
            pooled(name, image_stream(outputs[name]), self.pool, channels_first(module))
            for name, module in modules.items()
        ]


def pooled(name: str, feature: Tensor, cells: int, first: bool) -> Tensor:
    """A block's output as (B, D): maps (B, C, H, W) in cells, tokens (B, N, C) by their mean.

    Args:
        cells: Along each side; of a smaller map, each of its pixels is one.
        first: An output of three dimensions is (B, C, L), and not tokens.

    Raises:
        UserError: the output is no tensor, or a scalar for each sample.
    """
    if not isinstance(feature, Tensor) or feature.ndim < 2:
        raise UserError(f"{KEY}: block {name!r} returns no features; name another block")
    if feature.ndim == 4:
        height, width = feature.shape[2:]
        size = min(cells, height), min(cells, width)
        return F.adaptive_avg_pool2d(feature, size).flatten(1)
    if feature.ndim == 3 and not first:
        return feature.mean(1)
    return feature if feature.ndim == 2 else feature.flatten(2).mean(2)


def widened(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def others(cond: Cond, size: int, device: torch.device, by_label: bool) -> Tensor:
    """The pairs that are compared, (B, B) of booleans: not of a place with itself.

    A sample and the datum of the same place share their condition, so leaving that pair out makes
    sums over data and over the student's samples have the same number of independent terms.

    Args:
        by_label: Only pairs of one class label, where conditions have labels.
    """
    pairs = ~torch.eye(size, dtype=torch.bool, device=device)
    labels = (cond or {}).get(LABELS) if by_label else None
    return pairs if labels is None else pairs & (labels[:, None] == labels)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|² of features (N, D) and (M, D), (N, M); 0 within rounding for equal points."""
    square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return square.clamp(min=0)
