"""Tables of the benchmarks whose leaderboards are in docs/results/bench-NAME."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distill.benchmark import leaderboard
from distill.benchmark.leaderboard import LeaderboardRow, figure
from teachers.text import plural

RESULTS = Path(__file__).parent.parent / "docs" / "results"
Cell = Callable[[LeaderboardRow], str]


def lines(name: str) -> list[LeaderboardRow]:
    """What a benchmark left, best first; nothing where it was not run."""
    folder = RESULTS / f"bench-{name}"
    return leaderboard.read(folder) if folder.is_dir() else []


def distance(line: LeaderboardRow) -> str:
    """The Fréchet distance, and its spread over seeds."""
    return figure(line, "fd")


def right(line: LeaderboardRow) -> str:
    """Whole captions right, in per cent, and the Fréchet distance."""
    found = line.metrics["accuracy"]
    spread = f" ± {100 * found['spread']:.1f}" if len(line.seeds) > 1 else ""
    return f"{100 * found['mean']:.1f} %{spread}, {line.value('fd'):.1f}"


def students(name: str, cell: Cell = distance) -> str:
    """A row for each objective: its figure by step count, coverage in the fewest, cost."""
    found = [v for v in lines(name) if v.kind == "student" and v.steps]
    if not found:
        return "Not measured."
    counts = sorted({v.steps for v in found if v.steps})
    varied = any("coverage" in v.metrics for v in found)
    heads = ["objective", *map(steps, counts), *(["coverage"] if varied else [])]
    rows = [[*heads, "trained steps", "seconds", "GB"]]
    for row in grouped(found):
        first = row[0]
        cells = by_count(row, counts, cell)
        cells += [figure(first, "coverage")] if varied else []
        cells += [f"{first.train_steps:,.0f}", f"{first.wall_s:,.0f}"]
        rows.append([first.name, *cells, f"{first.peak_memory_gb:.2f}"])
    return table(rows)


def untrained(name: str, cell: Cell = distance) -> str:
    """A row for each sampler of the teacher, its full one first; evaluations in brackets."""

    def costed(line: LeaderboardRow) -> str:
        return f"{cell(line)} ({line.value('evaluations'):.3g})"

    found = [v for v in lines(name) if v.kind != "student"]
    if not found:
        return "Not measured."
    few = [v for v in found if v.kind == "baseline"]
    counts = sorted({v.steps for v in few if v.steps})
    rows = [["teacher by", *map(steps, counts)]]
    for line in (v for v in found if v.kind == "teacher"):
        full = f"{costed(line)}; coverage {line.value('coverage'):.3f}"
        rows.append([f"{line.name.removeprefix('teacher, ')}, {line.steps} steps: {full}"])
    for row in grouped(few):
        rows.append([row[0].name, *by_count(row, counts, costed)])
    width = len(rows[0])
    return table([[*r, *[""] * (width - len(r))] for r in rows])


def grouped(found: Sequence[LeaderboardRow]) -> list[list[LeaderboardRow]]:
    """Lines by name, in the order in which the names come, each by falling cost in steps."""
    rows: dict[str, list[LeaderboardRow]] = {}
    for line in found:
        rows.setdefault(line.name, []).append(line)
    return [sorted(row, key=lambda v: v.steps or 0) for row in rows.values()]


def by_count(row: Sequence[LeaderboardRow], counts: Sequence[int], cell: Cell) -> list[str]:
    """A row's cells, empty at counts that it was not measured at."""
    known = {v.steps: cell(v) for v in row}
    return [known.get(k, "") for k in counts]


def steps(count: int) -> str:
    return f"{count} {plural(count, 'step')}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
