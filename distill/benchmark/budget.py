"""How many steps a budget buys: of network evaluations, counted beforehand, or of seconds.

A run's evaluations follow from its recipe and its seed, so they can be counted without computing
one: the objective's own turns are played under the engine's own seeds on networks that return
their input. A budget in seconds is timed on the real thing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.data.stream import Stream
from distill.objectives.base import Batch
from distill.planning.plan import count_samples
from distill.sampling.guided_teacher import load_teacher
from distill.seeds import seed_all
from distill.training.build import build
from distill.training.networks import objective_of
from students.critic import Critic
from teachers.denoiser import Cond, Denoiser, Wrapper
from teachers.errors import UserError

WARM = 4  # steps that are not timed: the first allocate
TIMED = 12  # steps that are: enough for an objective whose student moves at every fifth


def steps_for_evaluations(recipe: Recipe, budget: float, most: int | None = None) -> int:
    """The most training steps whose samples through all networks do not exceed the budget.

    Args:
        most: How many to count, where it need not be known how many more there are.

    Raises:
        UserError: it does not buy one step, or a step evaluates no network.
    """
    steps, spent, total = 0, 0, 0
    for total in islice(evaluations_after_steps(recipe), most):
        if total == spent:
            raise UserError(f"budget: step {steps + 1} evaluates no network, so it never ends")
        if total > budget:
            break
        steps, spent = steps + 1, total
    if not steps:
        raise UserError(
            f"budget: {budget:,} network evaluations do not buy one step, which takes {total:,}; "
            "raise it"
        )
    return steps


def evaluations_after_steps(recipe: Recipe) -> Iterator[int]:
    """The samples through all networks after step 1, 2, …: those that the engine will count.

    A few samples stand for a shard: as many as the student has steps, where a shard is a multiple
    of that, so that each place of its chain has its share.
    """
    teacher = load_teacher(recipe)
    objective = objective_of(recipe, teacher, torch.device("cpu"))
    networks = {k: v for k, v in vars(objective).items() if isinstance(v, nn.Module)}
    counts = dict.fromkeys(networks, 0)
    count_samples(networks, counts)
    seed, shard = recipe.train.seed, recipe.train.batch // recipe.train.accumulate
    size = shard if shard % recipe.student.steps else recipe.student.steps
    x, cond = torch.zeros(size, *teacher.shape), teacher.codec.condition([0] * size)
    batch = Batch(x if recipe.needs_data else None, x.clone(), cond)
    step = 0
    while True:
        with hollow():
            seed_all(seed, "turns", step, 0)
            for place, turn in enumerate(objective.turns(step)):
                seed_all(seed, step, place, 0)
                turn.loss(batch)
                seed_all(seed, "turns", step, place + 1)
        step += 1
        yield sum(counts.values()) * recipe.train.batch // size


@contextmanager
def hollow() -> Iterator[None]:
    """Networks that return their input, and critics that cannot tell: only their calls count."""
    kinds: list[Any] = [k for k in every(Denoiser) if not issubclass(k, Wrapper)] + every(Critic)
    before = [(kind, kind.forward) for kind in kinds if "forward" in vars(kind)]
    for kind, _ in before:
        kind.forward = _undecided if issubclass(kind, Critic) else _as_it_is
    try:
        yield
    finally:
        for kind, forward in before:
            kind.forward = forward


def every(kind: type) -> list[type]:
    """A class and all that are derived from it."""
    found = [kind, *(below for k in kind.__subclasses__() for below in every(k))]
    return list(dict.fromkeys(found))


def _as_it_is(
    self: Any, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None
) -> Tensor:
    return x_t


def _undecided(self: Any, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
    """Logits (B,); the features are read, as the denoiser behind them may be counted."""
    self._denoiser[0](x_t, t, cond)
    return x_t.new_zeros(len(x_t))


def steps_for_seconds(recipe: Recipe, budget: float) -> int:
    """The training steps that fit in `budget` seconds here, from the time that a few take.

    Raises:
        UserError: not one does, or the recipe cannot be built.
    """
    with tempfile.TemporaryDirectory() as scratch:
        engine = build(recipe, Path(scratch) / "run").engine
        shards = engine.shards
        stream = Stream(
            engine.source, engine.accelerator.device, 0, range(shards), shards,
            recipe.train.batch // shards,
        )  # fmt: skip
        try:
            for _ in range(WARM):
                engine.advance(stream)
            _wait(engine.accelerator.device)
            began = time.perf_counter()
            for _ in range(TIMED):
                engine.advance(stream)
            _wait(engine.accelerator.device)
        finally:
            stream.close()
    each = (time.perf_counter() - began) / TIMED
    if budget < each:
        raise UserError(f"budget: a step takes {each:.3g} s, so {budget:g} s buy none; raise it")
    return int(budget / each)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
