"""Matching where a step begins at high noise, the critic where it begins at low: Flash-DMD.

Chen et al. 2025 (arXiv:2511.20549), whose code is not public: structure is decided by the first
steps of a chain and texture by the last ones, and the two gradients disturb each other. A rollout's
samples that end later come first, so those of low noise are its first ones.
"""

from __future__ import annotations

from distill.objectives.base import Batch
from students.critic import Critic
from students.generator import Generator
from teachers import conditions
from teachers.errors import UserError


def low_noise(student: Generator, size: int, first: int, split: float | None) -> int | None:
    """How many of a rollout's samples end with a step that begins below `split`; None without it.

    Args:
        size, first: Of the rollout.
    """
    if split is None:
        return None
    high = sum(t >= split for t in student.times)  # the steps that begin at high noise
    return student.remaining(size, first)[high - 1] if high else size


def rows(batch: Batch, part: slice) -> Batch:
    """A part of the batch; the batch itself where it is all of it."""
    if part in (slice(None), slice(0, None)):
        return batch
    x = None if batch.x is None else batch.x[part]
    return batch._replace(x=x, noise=batch.noise[part], cond=conditions.rows(batch.cond, part))


def check_split(split: float, student: Generator, critic: Critic | None, weight: float) -> None:
    """Refuse a split without a critic, or a chain with no step on one of its sides.

    Raises:
        UserError: naming the key.
    """
    if critic is None or not weight:
        raise UserError(
            "objective.split: below it a student learns from the critic alone; add critic: {} and "
            "a gan_weight, or remove it"
        )
    for count in student.counts:
        times = student.at(count).times
        if not min(times) < split <= max(times):
            shown = ", ".join(f"{t:g}" for t in times)
            raise UserError(
                f"objective.split: {split:g} has all steps of a chain on one side; they begin at "
                f"times {shown}"
            )
