"""What your own objective imports: `from distill.objective import Objective, Loss`."""

from distill.field_types import (
    Finite,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Real,
    Seed,
)
from distill.objectives.base import Auxiliary, Batch, Learns, Loss, Objective, Turn
from distill.objectives.validate import check_first, check_loss, check_turn

Count, Share, Whole = PositiveInt, Fraction, NonNegativeInt  # their former names

__all__ = [
    "Auxiliary",
    "Batch",
    "Count",
    "Finite",
    "Fraction",
    "Learns",
    "Loss",
    "NonNegative",
    "NonNegativeInt",
    "Objective",
    "Positive",
    "PositiveInt",
    "Real",
    "Seed",
    "Share",
    "Turn",
    "Whole",
    "check_first",
    "check_loss",
    "check_turn",
]
