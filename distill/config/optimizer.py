"""The `players` section of a recipe: optimizer and learning-rate schedule of each player."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic.dataclasses import dataclass
from torch import nn

from distill.field_types import Finite, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from teachers.errors import UserError

Name = Literal["adamw", "adamw8bit", "adamw-offloaded"]


Decay = Annotated[float, *Finite, Interval(ge=0, lt=1)]


@dataclass(frozen=True, config={"extra": "forbid"})
class Wait:
    """While a logged scalar is above a bound, a player learns once in `train.log_every` steps."""

    scalar: str  # PLAYER/NAME, such as critic/accuracy, also where several players learn together
    above: Annotated[float, *Finite]

    @property
    def player(self) -> str:
        """One that the scalar is of."""
        return self.scalar.partition("/")[0].split("+")[0]

    def found(self, logged: Iterable[str]) -> str | None:
        """The scalar's key among the logged ones, such as fake+critic/accuracy; None without it."""
        name = self.scalar.partition("/")[2]
        parts = ((key, *key.partition("/")[::2]) for key in logged)
        return next((k for k, who, n in parts if n == name and self.player in who.split("+")), None)


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
    frozen: str | None = None  # a regular expression found in the names of weights that stay
    begins: NonNegativeInt = 0  # the first training step in which it learns: others warm up before
    waits: Wait | None = None  # so that the ratio of updates follows who is ahead

    def __post_init__(self) -> None:
        try:
            re.compile(self.frozen or "")
        except re.error as error:
            raise ValueError(
                f"frozen, {self.frozen!r}, is no regular expression: {error}"
            ) from None

    def learning(self, network: nn.Module, player: str) -> list[nn.Parameter]:
        """The weights of a player's network that learn: all whose names `frozen` is not found in.

        Raises:
            UserError: they are all, or none is left.
        """
        named = dict(network.named_parameters())
        if self.frozen is None:
            return list(named.values())
        rest = [p for name, p in named.items() if not re.search(self.frozen, name)]
        if rest and len(rest) < len(named):
            return rest
        which = "no" if rest else "all"
        raise UserError(
            f"players.{player}.frozen: it is found in the names of {which} weights, which are like "
            f"{min(named)}; change it"
        )

    def rate(self, age: int, steps: int) -> float:
        """The learning rate `age` steps after the schedule's start, in a run of `steps` steps."""
        rate = self.lr * min(1.0, (age + 1) / (self.warmup + 1))
        if self.decay == "constant":
            return rate
        done = min(1.0, age / (self.decay_steps or steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return rate * (self.lr_end + (1 - self.lr_end) * left)
