"""`distill average`: a run's student by a post-hoc EMA, or by a searched combination."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.averaging.posthoc import averaged, snapshots
from distill.averaging.search import Candidate, Coefficients, averages, evolve
from distill.averaging.student import check_out, check_run, export, trained
from distill.console import consume_with_bar
from distill.data.fingerprint import of_tensors
from distill.files import write
from distill.sampling.student_sampler import student_samples
from distill.sampling.used_networks import of_headline
from distill.training import checkpoint
from eval.catalogue import headline
from teachers.errors import UserError, plural

NOISE = 1000  # the seed of the search's noise: none of those that figures are averaged over
LEAST = 2  # checkpoints that are worth a search
OWN = "ema"  # the name of the run's own average among the weights


def by_length(run: Path, length: float, out: Path, seeds: int | None = None) -> dict[str, Any]:
    """Export the student whose weights are the power-function average of that length.

    Args:
        seeds: Of the measurement; by default the recipe's.

    Raises:
        UserError: the run has no snapshots, or `out` exists.
    """
    check_run(run)
    check_out(out)
    entries = snapshots(run)
    source = trained(run)
    c, values = averaged(entries, length, len(source.params))
    source.set(values)
    updates = max(e.updates for e in entries)
    about = {
        "line": f"the post-hoc EMA of length {length:g} over {updates:,} updates, from "
        f"{len(entries)} snapshots (arXiv:2312.02696)",
        "ema_length": length,
        "coefficients": {f"{e.file.stem}, {e.length:g}": w
                         for e, w in zip(entries, c.tolist(), strict=True)},
    }  # fmt: skip
    return export(source, out, about, source.recipe.eval.seeds if seeds is None else seeds)


def by_search(
    run: Path, out: Path, evaluations: int, seed: int, window: int | None, steps: int | None
) -> dict[str, Any]:
    """Export the student whose weights are the best combination of saved ones that a search finds.

    The fitness is the protocol's headline distance on noise that no figure is measured on. A
    stopped search goes on from a file beside `out`.

    Args:
        evaluations: Candidates that are judged.
        window: How many of the newest checkpoints are combined; None for all.
        steps: The step count that is judged; None for the smallest.

    Raises:
        UserError: there are too few checkpoints, no protocol, or `out` exists.
    """
    check_run(run)
    check_out(out)
    folders = checkpoint.steps(run / "checkpoints")[-(window or 0) :]
    if len(folders) < LEAST:
        raise UserError(
            f"RUN: {run} has {len(folders)} {plural(len(folders), 'checkpoint')} to combine; train "
            "with train.keep=20 and a train.save_every that leaves as many"
        )
    source = trained(run)
    if (measure := source.measure) is None:
        raise UserError(f"RUN: {run} has no eval.protocol, which judges combinations; set one")
    count = min(source.student.counts) if steps is None else steps
    if count not in source.student.counts:
        known = ", ".join(map(str, source.student.counts))
        raise UserError(f"--steps {count}: this student was trained for {known}; give one of those")
    weights = saved(folders)
    few, names = source.student.at(count), list(weights)

    def fitness(c: Coefficients) -> float:
        source.set(combined(list(weights.values()), c))
        figures = measure.measure_seed(
            lambda prompts, s: student_samples(few, source.teacher, prompts, s), NOISE + seed
        )
        key = headline(figures)
        assert key is not None
        return figures[key]

    record = out.with_name(f".{out.name}.search.json")
    about = {"weights": names, "seed": seed, "steps": count, "protocol": measure.name}
    contents = {"contents": of_tensors(p for v in weights.values() for p in v)}
    judged = searched(fitness, founders(names), evaluations, seed, record, about | contents)
    best, judged_at = best_of(judged, run), f"{count} {plural(count, 'step')}"
    source.set(combined(list(weights.values()), best.coefficients))
    about |= {
        "line": f"a linear combination of {len(names)} saved weights, the best of "
        f"{evaluations:,} that a search judged at {judged_at} (LCSC, arXiv:2404.02241)",
        "coefficients": dict(zip(names, best.coefficients, strict=True)),
        "chosen_by": of_headline(measure.name),
        "fitness": {"best": best.fitness, "first": judged[0].fitness},
        "network_evaluations": evaluations * count * len(measure.prompts),
    }
    rows = export(source, out, about, source.recipe.eval.seeds)
    record.unlink(missing_ok=True)
    return rows


def best_of(judged: Sequence[Candidate], run: Path) -> Candidate:
    """The candidate of the lowest fitness.

    Raises:
        UserError: no fitness is a number.
    """
    if not math.isfinite((best := min(judged)).fitness):
        raise UserError(
            f"RUN: {run}: no combination of its weights has a finite figure; train again"
        )
    return best


def founders(names: Sequence[str]) -> list[Coefficients]:
    """What a search begins with: the run's own average, if it has one, and averages of the rest."""
    n = len(names)
    if names[0] != OWN:
        return averages(n)
    return [(1.0, *(0.0,) * (n - 1)), *((0.0, *c) for c in averages(n - 1))]


def saved(folders: Sequence[Path]) -> dict[str, list[Tensor]]:
    """The student's weights in each checkpoint by its name, after the average in the last one."""
    weights: dict[str, list[Tensor]] = {}
    for folder in folders:
        state = checkpoint.load(folder)
        weights[folder.name] = [p.cpu() for p in state["players"]["student"]["params"]]
    mean = state["ema"]["mean"]  # of the newest
    return {OWN: mean, **weights} if mean else weights


def combined(weights: Sequence[Sequence[Tensor]], c: Sequence[float]) -> Iterator[Tensor]:
    """Each parameter's linear combination, in float64."""
    for parts in zip(*weights, strict=True):
        yield sum((w * p.double() for w, p in zip(c, parts, strict=True)), torch.zeros(()))


def searched(
    fitness: Callable[[Coefficients], float],
    first: Sequence[Coefficients],
    evaluations: int,
    seed: int,
    record: Path,
    about: dict[str, Any],
) -> list[Candidate]:
    """The candidates of a search; a record of a search that was stopped gives their fitnesses.

    Args:
        about: Plain data on which the fitnesses depend.
    """
    known, values, judged = recorded(record, about), list[float](), list[Candidate]()

    def remembered(c: Coefficients) -> float:
        if len(values) < len(known):
            values.append(known[len(values)])
        else:
            value = float(fitness(c))
            values.append(value if math.isfinite(value) else math.inf)  # NaN has no order
            write(record, json.dumps({"about": about, "fitness": values}) + "\n")
        return values[-1]

    def run() -> Iterator[int]:
        for candidate in evolve(remembered, first, evaluations, seed):
            judged.append(candidate)
            yield len(judged)

    consume_with_bar(run(), evaluations, f"judging {evaluations} combinations of saved weights")
    return judged


def recorded(record: Path, about: dict[str, Any]) -> list[float]:
    """The fitnesses of a search that was stopped; none of another search."""
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        same = tree["about"] == json.loads(json.dumps(about))
        return [float(v) for v in tree["fitness"]] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
