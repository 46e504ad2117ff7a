"""The `players` section of a recipe: a player's optimiser and its learning-rate schedule."""

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
    """How a player's weights move: a form of AdamW under a learning-rate schedule."""

    optimizer: Name = "adamw"
    lr: Positive = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip: NonNegative = 1.0  # of the gradient's norm; 0 leaves it as it is
    warmup: NonNegativeInt = 0  # engine steps of linear rise
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: PositiveInt | None = None  # engine steps until `lr_end`; by default train.steps
    lr_end: Fraction = 0.0  # where the decay ends, as a share of lr

    def rate(self, age: int, steps: int) -> float:
        """The learning rate at `age` steps after the start, of `steps` in all."""
        rate = self.lr * min(1.0, (age + 1) / (self.warmup + 1))
        if self.decay == "constant":
            return rate
        done = min(1.0, age / (self.decay_steps or steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return rate * (self.lr_end + (1 - self.lr_end) * left)
