"""Types of numbers in recipes and objectives, which pydantic checks when a recipe is read."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval
from pydantic import AllowInfNan, BeforeValidator, Strict

PositiveInt = Annotated[int, Strict(), Interval(ge=1, le=10**9)]


NonNegativeInt = Annotated[int, Strict(), Interval(ge=0, le=10**9)]


Seed = Annotated[int, Strict(), Interval(ge=0, lt=2**63)]


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Finite = BeforeValidator(_not_a_switch), AllowInfNan(False)


Real = Annotated[float, *Finite]


Positive = Annotated[float, *Finite, Gt(0)]


NonNegative = Annotated[float, *Finite, Ge(0)]


Fraction = Annotated[float, *Finite, Interval(ge=0, le=1)]
