"""Scores of a student's samples against its teacher's, at fixed prompts; 1 is as good as it.

Every score is at most 1, so that a student of more variety than its teacher, as untrained ones are,
sets no standard that later checks fall short of. Samples that are not finite have the score 0.
Distances are root mean squares in data space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances between samples of the same prompt: (P, S, R) from x (P, S, ...), y (P, R, ...)."""
    x, y = x.flatten(2).double(), y.flatten(2).double()
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5


def spread(x: Tensor) -> float:
    """The mean distance between two samples of one prompt; x is (P, S, ...) with S > 1."""
    samples = x.shape[1]
    return float(distances(x, x).sum((1, 2)).mean() / (samples * (samples - 1)))


def diversity(student: Tensor, teacher: Tensor) -> float:
    """The student's spread at a fixed prompt as a share of the teacher's; both (P, S, ...)."""
    return _share(spread(student), spread(teacher))


def matching(student: Tensor, teacher: Tensor) -> float:
    """How near the two distributions are at a fixed prompt; both (P, S, ...).

    The energy distance is 2 E|x - y| - E|x - x'| - E|y - y'|, zero for equal distributions (Székely
    and Rizzo 2013). The score is E|y - y'| / (2 E|x - y| - E|x - x'|), with the teacher's y.
    """
    across = float(distances(student, teacher).mean())
    return _share(spread(teacher), 2 * across - spread(student))


def nearest(student: Tensor, teacher: Tensor, pictures: Tensor) -> float:
    """The student's distance to the nearest of some pictures as a share of the teacher's.

    Args:
        student, teacher: Samples (P, S, ...).
        pictures: (N, ...), what the model should not repeat.
    """
    near = [
        float(distances(x.flatten(0, 1)[None], pictures[None]).amin(2).mean())
        for x in (student, teacher)
    ]
    return _share(near[0], near[1])


def preferred(student: Tensor, teacher: Tensor) -> float:
    """How often the student's sample has the higher reward, of pairs for the same prompt.

    Args:
        student, teacher: Rewards (P, S) and (P, R). Equal ones count as half; one that is no number
            is the lowest.
    """
    mine, other = (r.double().nan_to_num(nan=-math.inf) for r in (student, teacher))
    difference = mine[:, :, None] - other[:, None]
    return float((difference.nan_to_num(nan=0.0).sign().mean() + 1) / 2)


def _share(part: float, whole: float) -> float:
    if not (math.isfinite(part) and math.isfinite(whole)):  # min(1.0, nan) is 1.0
        return 0.0
    return min(1.0, part / whole) if whole > 0 else 1.0
