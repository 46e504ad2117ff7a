"""LCSC: an evolutionary search for the best linear combination of saved weights.

Liu et al. 2024 (arXiv:2404.02241). θ = Σ c_i θ_i with Σ c_i = 1, where coefficients may be negative
and above 1, which no moving average can be. A candidate is its differences to the last weights, so
that the sum is always 1. The search depends on its seed and on the fitnesses alone.

Differs from the paper, whose search is not released: founders are moving averages of several
lengths, from the last weights alone to the even average; a child is a blend of two parents, some of
whose coefficients move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

Coefficients = tuple[float, ...]

POPULATION = 12  # that survive; parents are the better of two that are drawn
DECAYS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)  # from weights to weights, of the founders' averages
MOVED = 0.3  # the share of a child's coefficients that move
REACH = (0.02, 0.1, 0.3)  # standard deviations by which they do


class Candidate(NamedTuple):
    """Coefficients that were judged; a lower fitness is better."""

    fitness: float
    coefficients: Coefficients


def averages(n: int) -> list[Coefficients]:
    """Moving averages of n weights, from the last alone to the even one, for the founders."""
    found = []
    for decay in DECAYS:
        weights = [decay ** (n - 1 - i) for i in range(n)]
        found.append(tuple(w / sum(weights) for w in weights))
    return found


def evolve(
    fitness: Callable[[Coefficients], float],
    founders: Sequence[Coefficients],
    evaluations: int,
    seed: int,
) -> Iterator[Candidate]:
    """Judge candidates, the founders first; yields each.

    Args:
        fitness: Of coefficients whose sum is 1; lower is better.
        founders: At least one.
        evaluations: How many candidates are judged.
    """
    rng, judged = Random(seed), list[Candidate]()
    for place in range(evaluations):
        best = sorted(judged)[:POPULATION]
        child = founders[place] if place < len(founders) else offspring(rng, best)
        judged.append(Candidate(fitness(child), child))
        yield judged[-1]


def offspring(rng: Random, parents: list[Candidate]) -> Coefficients:
    """A blend of two parents, some of whose coefficients move; the sum stays 1."""
    a, b = (min(rng.choice(parents), rng.choice(parents)).coefficients for _ in range(2))
    share, reach = rng.random(), rng.choice(REACH)
    free = [
        x + share * (y - x) + (rng.gauss(0, reach) if rng.random() < MOVED else 0.0)
        for x, y in zip(a[:-1], b[:-1], strict=True)
    ]
    return (*free, 1 - sum(free))
