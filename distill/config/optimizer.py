"""The `players` section of a recipe: optimizer and learning-rate schedule of each player."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic.dataclasses import dataclass

from distill.field_types import Finite, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt

Name = Literal["adamw", "adamw8bit", "adamw-offloaded"]


Decay = Annotated[float, *Finite, Interval(ge=0, lt=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class OptimizerConfig:
    """A form of AdamW with a learning-rate schedule."""

    optimizer: Name = "adamw"  # adamw8bit: 8-bit moments; adamw-offloaded: moments in host memory
    lr: Positive = 1e-4  # learning rate after the warmup
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decays of the first and second moments
    eps: Positive = 1e-8  # added to the denominator
    weight_decay: NonNegative = 0.01
    clip: NonNegative = 1.0  # largest norm of the gradient; 0 means no clipping
    warmup: NonNegativeInt = 0  # training steps of linear rise to lr
    decay: Literal["constant", "linear", "cosine"] = "constant"  # of lr after the warmup
    decay_steps: PositiveInt | None = None  # training steps of the decay; by default train.steps
    lr_end: Fraction = 0.0  # learning rate after the decay, as a share of lr

    def rate(self, age: int, steps: int) -> float:
        """The learning rate `age` steps after the schedule's start, in a run of `steps` steps."""
        rate = self.lr * min(1.0, (age + 1) / (self.warmup + 1))
        if self.decay == "constant":
            return rate
        done = min(1.0, age / (self.decay_steps or steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return rate * (self.lr_end + (1 - self.lr_end) * left)
