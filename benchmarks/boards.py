"""Markdown tables of the leaderboards in docs/results/bench-NAME."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distill.benchmark import leaderboard
from distill.benchmark.leaderboard import LeaderboardRow, figure
from eval import catalogue
from teachers.errors import plural

RESULTS = Path(__file__).parent.parent / "docs" / "results"
Cell = Callable[[LeaderboardRow], str]


def lines(name: str) -> list[LeaderboardRow]:
    """The rows of a benchmark's leaderboard, best first; none if it was not run."""
    folder = RESULTS / f"bench-{name}"
    return leaderboard.read(folder) if folder.is_dir() else []


def distance(line: LeaderboardRow) -> str:
    """The Fréchet distance, and its spread over seeds."""
    return figure(line, "fd")


def caption_accuracy(line: LeaderboardRow) -> str:
    """The share of captions that are wholly right, in per cent, and the Fréchet distance."""
    accuracy = line.metrics["accuracy"]
    spread = f" ± {100 * accuracy['spread']:.1f}" if len(line.seeds) > 1 else ""
    return f"{100 * accuracy['mean']:.1f} %{spread}, {line.value('fd'):.1f}"


def students(name: str, cell: Cell = distance) -> str:
    """A row for each objective: a metric by step count, coverage at the fewest steps, cost."""
    results = [v for v in lines(name) if v.kind == "student" and v.steps]
    if not results:
        return "Not measured."
    counts = sorted({v.steps for v in results if v.steps})
    has_coverage = any("coverage" in v.metrics for v in results)
    heads = [
        "objective",
        *map(steps, counts),
        *([catalogue.short("coverage")] if has_coverage else []),
    ]
    rows = [[*heads, "trained steps", "seconds", "GB"]]
    for row in grouped(results):
        first = row[0]
        cells = by_count(row, counts, cell)
        cells += [figure(first, "coverage")] if has_coverage else []
        cells += [f"{first.train_steps:,.0f}", f"{first.wall_s:,.0f}"]
        rows.append([first.name, *cells, f"{first.peak_memory_gb:.2f}"])
    return table(rows)


def untrained(name: str, cell: Cell = distance) -> str:
    """A row for each sampler of the teacher, the full one first; evaluations in brackets."""

    def with_cost(line: LeaderboardRow) -> str:
        return f"{cell(line)} ({line.value('evaluations'):.3g})"

    results = [v for v in lines(name) if v.kind != "student"]
    if not results:
        return "Not measured."
    few = [v for v in results if v.kind == "baseline"]
    counts = sorted({v.steps for v in few if v.steps})
    rows = [["teacher by", *map(steps, counts)]]
    for line in (v for v in results if v.kind == "teacher"):
        full = f"{with_cost(line)}; coverage {line.value('coverage'):.3f}"
        rows.append([f"{line.name.removeprefix('teacher, ')}, {line.steps} steps: {full}"])
    for row in grouped(few):
        rows.append([row[0].name, *by_count(row, counts, with_cost)])
    width = len(rows[0])
    return table([[*r, *[""] * (width - len(r))] for r in rows])


def grouped(results: Sequence[LeaderboardRow]) -> list[list[LeaderboardRow]]:
    """Lines grouped by name, in the order of the names' first lines; each group by step count."""
    rows: dict[str, list[LeaderboardRow]] = {}
    for line in results:
        rows.setdefault(line.name, []).append(line)
    return [sorted(row, key=lambda v: v.steps or 0) for row in rows.values()]


def by_count(row: Sequence[LeaderboardRow], counts: Sequence[int], cell: Cell) -> list[str]:
    """A row's cells; empty at step counts that were not measured."""
    cells = {v.steps: cell(v) for v in row}
    return [cells.get(k, "") for k in counts]


def steps(count: int) -> str:
    return f"{count} {plural(count, 'step')}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row holds the heads."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
