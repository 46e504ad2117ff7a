"""A metric of the user's own: a function of samples, `eval: {metric: "mine.py:score"}`.

`score(samples)` returns a number, or numbers by name, of samples (N, ...) as the network makes
them, before any decoding. With a second argument it is given the teacher's samples from the same
noise and conditions, and with a third one the conditions. An argument with a default other than
None is the function's own setting. Lower is better, unless the function has the attribute
`higher_is_better = True`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from numbers import Real
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from distill.config.recipe import Recipe
from distill.data.stream import Source
from distill.profiling import denoisers_in, evaluations_of
from distill.sampling.guided_teacher import guided
from distill.sampling.timesteps import initial_state
from students.export.folder import sample_student
from students.generator import Generator
from teachers import conditions
from teachers.denoiser import Cond
from teachers.errors import UserError, clipped, plural
from teachers.solver import SOLVERS
from teachers.storage.plugin import called, function_at
from teachers.teacher import Teacher

KEY = "eval.metric"
BATCH = 256  # samples in one call of the networks
# What a row of figures holds beside the metric's numbers.
TAKEN = {"protocol", "n", "seeds", "spread", "evaluations", "solver", "steps", "headline", "raised"}
OTHER_SEED = 10_000  # apart from the seed of the samples that a teacher's own are compared with


class OwnMetric:
    """A recipe's own metric, with the conditions and the teacher's samples that it compares with.

    Raises:
        UserError: there is no such function, or it returns no number.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, source: Source) -> None:
        assert recipe.eval.metric is not None
        self.recipe, self.teacher, self.place = recipe, teacher, recipe.eval.metric
        self.function = function_at(self.place, KEY)
        self.arguments = arguments_of(self.function)
        self.n = recipe.eval.samples
        index = torch.arange(self.n) % source.size
        self.cond: Cond = source.take(index).cond
        self._references: dict[int, Tensor] = {}
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(2, self.n, *teacher.shape, generator=draw)
        self.numbers(noise[0], noise[1])  # a metric that fails does so before training

    @property
    def lower_is_better(self) -> bool:
        return not getattr(self.function, "higher_is_better", False)

    def numbers(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        """The function's numbers by name, for samples (N, ...) and the teacher's (N, ...).

        Raises:
            UserError: it raises an exception, or returns something else.
        """
        # copies, since it may write into its arguments, and these are read again
        given = (samples.cpu().clone(), reference.cpu().clone(), deepcopy(self.cond))
        with torch.random.fork_rng(devices=()):
            result = called(self.place, KEY, *given[: self.arguments])
        named = result if isinstance(result, Mapping) else {self.place.rpartition(":")[2]: result}
        values = {str(k): number(v) for k, v in named.items()}
        if not values or None in values.values():
            raise UserError(
                f"{KEY}: {clipped(self.place)!r} returned {clipped(type(result).__name__)}; return "
                "a number, or a dict of numbers by name"
            )
        if taken := sorted(TAKEN & values.keys()):
            raise UserError(
                f"{KEY}: {clipped(self.place)!r} calls a number {taken[0]!r}, which is a fact of "
                "every row; give it another name"
            )
        numbers = {k: v for k, v in values.items() if v is not None}
        if bad := next((k for k, v in numbers.items() if not math.isfinite(v)), None):
            raise UserError(
                f"{KEY}: {clipped(self.place)!r}: {clipped(bad)!r} is {numbers[bad]}; return "
                "finite numbers for any samples, noise included"
            )
        return numbers

    def student(self, student: Generator, seeds: int) -> dict[str, Any]:
        """The figures of a student in all of its steps, with its present weights."""

        def samples(seed: int) -> Tensor:
            labels = [0] * self.n
            return sample_student(student, self.teacher, labels, seed, BATCH, self.cond)

        steps = len(student.times)
        return self.average(lambda seed: self.numbers(samples(seed), self.reference(seed)), seeds,
                            evaluations=float(steps))  # fmt: skip

    def of_teacher(self, steps: int, seeds: int, full: bool) -> dict[str, Any]:
        """The figures of the guided teacher in `steps` steps.

        Args:
            full: These are the steps of the samples that others are compared with, so that these
                samples are from other noise.
        """
        cost = 0.0

        def figures(seed: int) -> dict[str, float]:
            nonlocal cost
            samples, cost = self.teacher_samples(steps, seed)
            return self.numbers(samples, self.reference(seed + OTHER_SEED * full))

        rows = self.average(figures, seeds, evaluations=0.0)
        solver = self.recipe.eval.teacher_solver
        return {**rows, "evaluations": cost, "solver": solver, "steps": steps}

    def reference(self, seed: int) -> Tensor:
        """The teacher's samples at its full steps; drawn once for each seed."""
        if seed not in self._references:
            self._references[seed] = self.teacher_samples(self.recipe.eval.teacher_steps, seed)[0]
        return self._references[seed]

    @torch.no_grad()
    def teacher_samples(self, steps: int, seed: int) -> tuple[Tensor, float]:
        """Samples (N, ...) of the guided teacher, and the network evaluations of one of them."""
        denoiser = guided(self.recipe.teacher, self.teacher)
        solver, times = SOLVERS[self.recipe.eval.teacher_solver], denoiser.process.grid(steps)
        device = next(self.teacher.denoiser.parameters()).device
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.n, *self.teacher.shape, generator=draw)
        parts = []
        with (
            torch.random.fork_rng(),
            evaluations_of(denoisers_in({"teacher": denoiser})) as counts,
        ):
            torch.manual_seed(seed)  # for stochastic solvers
            for i in range(0, self.n, BATCH):
                rows = slice(i, i + BATCH)
                cond = conditions.moved(conditions.rows(self.cond, rows), device)
                x_t = initial_state(denoiser, noise[rows].to(device), times)
                parts.append(solver(denoiser, x_t, times.to(device), cond))
        return torch.cat(parts), counts["teacher"] / self.n

    def average(
        self, figures: Callable[[int], dict[str, float]], seeds: int, **facts: Any
    ) -> dict[str, Any]:
        """The means over seeds, their standard deviations, and what they are of."""
        rows = [figures(seed) for seed in range(seeds)]
        means = {k: sum(r[k] for r in rows) / seeds for k in rows[0]}
        spread = {
            k: math.sqrt(sum((r[k] - m) ** 2 for r in rows) / max(seeds - 1, 1))
            for k, m in means.items()
        }
        about = {"protocol": self.place, "n": self.n, "seeds": seeds, "spread": spread}
        return {**means, **about, **facts}

    def measure(self, student: Generator) -> dict[str, Any]:
        """The figures of the student at every count, and of the teacher in its and in few steps."""
        cfg = self.recipe.eval
        students = {str(k): self.student(student.at(k), cfg.seeds) for k in student.counts}
        tree: dict[str, Any] = {"metric": self.place, "student": students}
        if cfg.teacher_seeds:
            tree["teacher"] = self.of_teacher(cfg.teacher_steps, cfg.teacher_seeds, True)
            tree["teacher_few"] = {
                str(k): self.of_teacher(k, cfg.teacher_seeds, False) for k in student.counts
            }
        return tree


def arguments_of(function: Callable[..., Any]) -> int:
    """How many of samples, the teacher's samples and conditions a function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of compiled code
        return 1
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = [p.default is not p.empty and p.default is not None for p in places]
    count = own.index(True) if True in own else len(places)
    return max(1, min(count, 3))


def number(value: Any) -> float | None:
    """A number of Python, torch or numpy as a float; None of anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return None


def rows_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an own metric's table by their names: the teacher, and then the students."""
    rows: dict[str, dict[str, Any]] = {}
    for row in [metrics.get("teacher"), *metrics.get("teacher_few", {}).values()]:
        if row is not None:
            name = f"{row['solver']} {plural(row['steps'], 'step')}"
            rows[f"teacher, {row['steps']} {name}"] = row
    return rows | {
        f"student, {k} {plural(int(k), 'step')}": row for k, row in metrics["student"].items()
    }


def names_in(metrics: Mapping[str, Any]) -> list[str]:
    """The names of the numbers that the metric returned."""
    return list(next(iter(metrics["student"].values()))["spread"])


def cells_of(row: Mapping[str, Any], names: list[str]) -> list[str]:
    """A row's evaluations and numbers, with their spread over seeds."""
    spread = row["spread"] if row["seeds"] > 1 else {}
    values = [f"{row[k]:.4g}" + (f" ±{spread[k]:.2g}" if k in spread else "") for k in names]
    return [f"{row['evaluations']:g}", *values]


def table_of(metrics: Mapping[str, Any]) -> Table:
    """The figures of a run by its own metric, for the terminal."""
    first = next(iter(metrics["student"].values()))
    title = f"{metrics['metric']}: {first['n']:,} samples"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("sampler")
    names = names_in(metrics)
    for head in ("evals", *names):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in rows_of(metrics).items():
        table.add_row(name, *cells_of(row, names))
    return table


def page_of(metrics: Mapping[str, Any]) -> str:
    """The same as a section of a README."""
    names = names_in(metrics)
    lines = [f"| sampler | evaluations | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for name, row in rows_of(metrics).items():
        lines.append(f"| {name} | {' | '.join(cells_of(row, names))} |")
    return f"\n## Figures, by `{metrics['metric']}`\n\n" + "\n".join(lines) + "\n"
