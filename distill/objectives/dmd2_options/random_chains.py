"""Chains of random length at random times, so that a student is not bound to one schedule.

CDM, Liu et al. 2026 (arXiv:2605.06376), as in its released code and in LightX2V's, which takes one
time from each of even bins. A chain is one batch's, and the same on every process, as Python's
`random` is.
"""

from __future__ import annotations

import random
from typing import Annotated

from annotated_types import Interval
from pydantic.dataclasses import dataclass

from distill.field_types import Fraction, PositiveInt
from students.generator import Generator
from teachers.errors import UserError


@dataclass(frozen=True, config={"extra": "forbid"})
class RandomChains:
    """Chains of `shortest` to `longest` steps: the student's first time, then others between.

    low, high: Of the other times, in the process's own t.
    even: One time in each of as many even parts of low … high, in place of independent times.
    """

    shortest: PositiveInt = 1
    longest: Annotated[PositiveInt, Interval(le=1000)] = 28
    low: Fraction = 0.25
    high: Fraction = 0.95
    even: bool = False

    def __post_init__(self) -> None:
        if self.shortest > self.longest:
            raise ValueError(f"shortest, {self.shortest}, is above longest, {self.longest}")
        if not 0 < self.low < self.high:
            raise ValueError(f"low, {self.low}, must be above 0 and below high, {self.high}")

    def times(self) -> list[float]:
        """The times after the first one, downwards; one that is drawn twice is one step."""
        n = random.randint(self.shortest, self.longest) - 1
        shares = [random.random() for _ in range(n)]
        if self.even:
            shares = [(k + share) / n for k, share in enumerate(shares)]
        return sorted({self.low + (self.high - self.low) * u for u in shares}, reverse=True)


def sample_chain(student: Generator, chains: RandomChains | None) -> tuple[Generator, int]:
    """The student with the chain of one training step, and the place where its `rollout` begins."""
    if chains is None:
        return student.sample_chain()
    times = (student.times[0], *chains.times())
    made = Generator(student.denoiser, times, student.renoise, student.floor, student.start)
    made.gamma = student.gamma
    return made, random.randrange(len(times))


def check_chains(chains: RandomChains, student: Generator, first_step: float) -> None:
    """Refuse chains that do not begin with the student's first time, or that a flag has no use for.

    Raises:
        UserError: naming the key.
    """
    if chains.high >= student.times[0]:
        raise UserError(
            f"objective.schedule: high, {chains.high:g}, is not below the student's first time, "
            f"{student.times[0]:g}; lower it"
        )
    if first_step and chains.shortest < 2:
        raise UserError(
            "objective.schedule: with first_step a chain needs two steps; set shortest to 2"
        )
