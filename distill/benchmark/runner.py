"""Runs a benchmark: measures the teacher once, runs every row, writes leaderboard and plots."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from distill.benchmark import leaderboard
from distill.benchmark.leaderboard import LeaderboardRow, distance_of, with_spread
from distill.benchmark.plots import plot
from distill.benchmark.spec import Bench, BenchmarkRun, BenchmarkRunner, digest, teacher_files
from distill.benchmark.state import check_folder, measured, table
from distill.config.recipe import Recipe
from distill.console import consume_with_bar, print_line, time_left
from distill.data.encode import device, on_device
from distill.data.from_recipe import check_places
from distill.files import write
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import check_protocol
from distill.sampling.teacher_sampler import SolverSampler
from distill.training.networks import check_form, form_for
from eval import catalogue
from eval.protocols.measure import Protocol, protocol
from students.export.forms import form_of
from teachers.errors import UserError
from teachers.teacher import Teacher

TEACHER = "teacher.json"  # the teacher's metrics, by the hash of what they depend on


def bench(path: str, overrides: list[str], out: Path, jobs: int = 1) -> list[LeaderboardRow]:
    """Run what is left of a benchmark in `out`, and write its leaderboard there.

    Raises:
        UserError: the benchmark cannot be run, or another process holds the folder.
        KeyboardInterrupt: it was stopped; the same call resumes it.
    """
    made = Bench.load(path, overrides)
    check_folder(out)
    recipe = made.reference()
    measure = protocol(recipe.eval.protocol) if recipe.eval.protocol else None
    teacher = load_teacher(recipe.teacher)
    if measure is not None:
        check_protocol(measure, teacher)
    elif form_of(teacher).leaves_pipeline:
        raise UserError(
            f"{path}: common.eval.protocol: missing; name the protocol that measures students"
        )
    elif made.baselines:
        raise UserError(f"{path}: baselines: a protocol measures them; set eval.protocol")
    for baseline in made.baselines:
        baseline.check(recipe, teacher)
    check_rows(made, teacher, path)
    race = BenchmarkRunner(made, out)
    try:
        with on_device([teacher.denoiser], device()):
            taught = [] if measure is None else teacher_lines(race, recipe, teacher, measure)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the runs are other processes
        runs = len(race.entries)
        done = [e for e in race.entries if race.done(e)]
        if done:
            print_line(f"{len(done)} of {runs} runs were done before")
        with closing(ended(race, jobs, len(done))) as counts:
            consume_with_bar(counts, runs, f"{runs - len(done)} runs, each for {made.budget}")
        lines = [*taught, *leaderboard.student_lines(race)]
        leaderboard.save(race, lines)
    finally:
        race.close()
    lines = leaderboard.read(out)
    plot(lines, out)
    return lines


def check_rows(made: Bench, teacher: Teacher, path: str) -> None:
    """Refuse, before any work, a row that cannot be built, whose data are missing, or whose first
    step costs more than the budget.

    Raises:
        UserError: naming the row.
    """
    for row in made.rows:
        recipe = made.recipe(row, made.seeds[0])
        try:
            check_form(recipe, form_for(recipe, teacher))
            check_places(recipe, teacher)
            made.budget.check(recipe)
        except UserError as error:
            raise UserError(f"{path}: row {row.name!r}: {error}") from None


def standings(lines: list[LeaderboardRow]) -> Table:
    """A table for the terminal: distances of students and teacher by step count, best first."""
    counts = sorted({v.steps for v in lines if v.steps and v.kind != "teacher"})
    table = Table(box=None, pad_edge=False, header_style="bold")
    key = next((distance_of(v.metrics) for v in lines if v.metrics), "fd")
    table.add_column(f"{catalogue.short(key)} at steps")
    for k in counts:
        table.add_column(str(k), justify="right")
    rows: dict[str, dict[int, str]] = {}
    for line in lines:
        rows.setdefault(line.name, {})
        if line.steps in counts:
            rows[line.name][line.steps] = leaderboard.figure(line, key)
        elif line.kind == "teacher":
            rows[f"{line.name}, {line.steps} steps: {leaderboard.figure(line, key)}"] = {}
            rows.pop(line.name)
    for name, cells in rows.items():
        table.add_row(Text(name), *(cells.get(k, "") for k in counts))
    return table


def ended(race: BenchmarkRunner, jobs: int, before: int) -> Generator[int]:
    """Run all, print a line for each run that ends, and yield the count of those that have."""
    began, runs = time.monotonic(), len(race.entries)
    for count, entry in enumerate(race.run(jobs), before + 1):
        left = (time.monotonic() - began) / (count - before) * (runs - count)
        rest = f"; {time_left(left)}" if count < runs else ""
        print_line(f"{count}/{runs}  {outcome(race, entry)}{rest}")
        yield count


def outcome(race: BenchmarkRunner, entry: BenchmarkRun) -> str:
    """One line: how a run ended."""
    who = f"{entry.row.name}, seed {entry.seed}"
    if (why := race.failure(entry)) is not None:
        return f"{who}: failed: {why}"
    summary = entry.summary()
    assert summary is not None
    student = summary["metrics"].get("student", {})
    keys = {k: distance_of(v) for k, v in student.items()}
    figures = "  ".join(
        f"{key} {catalogue.written(key, student[k][key])} at {k}" for k, key in keys.items()
    )
    return f"{who}: {figures}; {summary['steps']} steps in {summary['wall_s']:.0f} s"


def teacher_lines(
    race: BenchmarkRunner, recipe: Recipe, teacher: Teacher, measure: Protocol
) -> list[LeaderboardRow]:
    """The teacher at its full steps and with every baseline; each is measured once, and saved."""
    file = race.out / TEACHER
    saved = table(file) if file.exists() else {}
    tree, count = recipe.tree(), len(race.bench.seeds)
    solver, full = recipe.eval.teacher_solver, recipe.eval.teacher_steps
    seeds, files = list(range(count)), teacher_files(recipe.teacher)
    lines = []

    def once(sampler: Any, compute: Any) -> Any:
        key = digest([sampler, tree["teacher"], files, measure.name, count])
        if not (measured(saved.get(key)) and "spread" in saved[key]):  # none yet, or damaged
            saved[key] = compute()
            write(file, json.dumps(saved, indent=2) + "\n")
        return with_spread(saved[key])

    def whole() -> dict[str, Any]:
        return measure(SolverSampler(recipe, teacher, solver, "own", full, measure.prompts), count)

    more = len(race.bench.baselines)
    print_line(
        f"measuring the teacher: {full} steps of {solver}, and {more} other{'s' * (more != 1)}"
    )
    metrics = once([solver, full], whole)
    lines.append(LeaderboardRow(f"teacher, {solver}", "teacher", None, full, seeds, metrics))
    for b in race.bench.baselines:
        for k in b.steps:
            metrics = once(
                [b.model_dump(mode="json", exclude={"steps"}), k],
                lambda b=b, k=k: b.measure(recipe, teacher, measure, k, count),
            )
            lines.append(LeaderboardRow(b.name, "baseline", None, k, seeds, metrics))
    return lines
