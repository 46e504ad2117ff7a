"""Leaderboards: the summaries of a benchmark's runs as rows, in JSON and in Markdown."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, Literal

from distill.benchmark.spec import BenchmarkRun, BenchmarkRunner, Row
from distill.benchmark.state import COSTS
from distill.files import write
from eval import catalogue

MARK = "†"  # of figures that are not held out


@dataclass(frozen=True)
class LeaderboardRow:
    """One contestant at one step count.

    Args:
        steps: Of sampling; None for a row whose runs all failed.
        metrics: By name, the mean over seeds and the spread (population standard deviation).
        seeds: Of the runs that finished; for the teacher, of its noise.
        train_steps, network_evaluations, wall_s, peak_memory_gb: Of training, the mean over seeds.
        failed: By seed, why its run failed.
        not_held_out: The metrics whose network was in the loss.
    """

    name: str
    kind: Literal["student", "teacher", "baseline"]
    objective: str | None
    steps: int | None
    seeds: list[int]
    metrics: dict[str, dict[str, float]]
    train_steps: float | None = None
    network_evaluations: float | None = None
    wall_s: float | None = None
    peak_memory_gb: float | None = None
    failed: dict[str, str] = field(default_factory=dict)
    not_held_out: list[str] = field(default_factory=list)

    def value(self, key: str) -> float:
        """The mean of a metric."""
        return self.metrics[key]["mean"]

    @property
    def distance(self) -> float:
        """The mean of the metric that orders rows."""
        return self.value(distance_of(self.metrics))

    @property
    def ranked(self) -> bool:
        """Whether its distance is held out, and so may be compared with others'."""
        return not self.metrics or distance_of(self.metrics) not in self.not_held_out


def distance_of(figures: Mapping[str, Any]) -> str:
    """The name of the distance among a protocol's figures."""
    key = catalogue.headline(figures)
    assert key is not None, "every protocol has a distance"
    return key


def student_lines(race: BenchmarkRunner) -> list[LeaderboardRow]:
    """The leaderboard's lines of all students, grouped by row."""
    lines = []
    for row in race.bench.rows:
        entries = [e for e in race.entries if e.row is row]
        lines += lines_of(race, row, entries)
    return lines


def lines_of(
    race: BenchmarkRunner, row: Row, entries: Sequence[BenchmarkRun]
) -> list[LeaderboardRow]:
    """A line for each step count that the row's runs were measured at."""
    name = race.bench.recipe(row, entries[0].seed).objective["name"]
    failed = {str(e.seed): why for e in entries if (why := race.failure(e)) is not None}
    finished = [e for e in entries if race.done(e) and str(e.seed) not in failed]
    summaries = {e.seed: s for e in finished if (s := e.summary()) is not None}
    if not summaries:
        return [LeaderboardRow(row.name, "student", name, None, [], {}, failed=failed)]
    runs = list(summaries.values())
    lost = [k for k, held in runs[0].get("held_out", {}).items() if not held]

    def average(key: str) -> float:
        return mean(s[key] for s in runs)

    return [
        LeaderboardRow(
            row.name,
            "student",
            name,
            int(steps),
            list(summaries),
            over_seeds([s["metrics"]["student"][steps] for s in runs]),
            average("steps"),
            average("network_evaluations"),
            average("wall_s"),
            average("peak_memory_gb"),
            failed,
            lost,
        )
        for steps in runs[0]["metrics"]["student"]
        if all(steps in s["metrics"]["student"] for s in runs)
    ]


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean and the spread of every metric that is a float in all rows."""
    keys = [k for k in rows[0] if all(isinstance(r.get(k), float) for r in rows)]
    values = {k: [r[k] for r in rows] for k in keys}
    return {k: {"mean": mean(v), "spread": pstdev(v)} for k, v in values.items()}


def with_spread(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A protocol's means and spreads over seeds in the form of `LeaderboardRow.metrics`."""
    spread = metrics["spread"]
    keys = [k for k, v in metrics.items() if isinstance(v, float)]
    return {k: {"mean": metrics[k], "spread": spread.get(k, 0.0)} for k in keys}


def save(race: BenchmarkRunner, lines: Sequence[LeaderboardRow]) -> None:
    """Write leaderboard.json and leaderboard.md, students best first, and runs.json."""
    lines = ordered(lines)
    write(race.out / "runs.json", json.dumps(figures_of_runs(race), indent=1) + "\n")
    tree = json.dumps([asdict(v) for v in lines], indent=2, ensure_ascii=False)
    write(race.out / "leaderboard.json", tree + "\n")
    write(race.out / "leaderboard.md", markdown(race, lines))


def figures_of_runs(race: BenchmarkRunner) -> list[dict[str, Any]]:
    """What each finished run cost, and its student's figures at each step count."""
    return [
        {
            "row": entry.row.name,
            "seed": entry.seed,
            "hash": entry.hash,
            **{("train_steps" if k == "steps" else k): summary[k] for k in COSTS},
            "metrics": summary["metrics"]["student"],
        }
        for entry in race.entries
        if race.done(entry) and (summary := entry.summary()) is not None
    ]


def read(out: Path) -> list[LeaderboardRow]:
    """The lines that `save` wrote to a folder."""
    return [
        LeaderboardRow(**tree)
        for tree in json.loads((out / "leaderboard.json").read_text(encoding="utf-8"))
    ]


def ordered(lines: Iterable[LeaderboardRow]) -> list[LeaderboardRow]:
    """The teacher, its baselines, then students by their distance in the fewest steps.

    Rows whose distance is not held out come after the others, and those whose runs all failed are
    last.
    """
    lines = list(lines)
    best: dict[str, float] = {}
    for line in sorted((v for v in lines if v.metrics), key=lambda v: v.steps or 0):
        best.setdefault(line.name, line.distance)
    kinds = ("teacher", "baseline", "student")

    def key(line: LeaderboardRow) -> tuple[int, bool, float, str, int]:
        place = best.get(line.name, float("inf")) if line.kind == "student" else 0.0
        name = line.name if line.kind == "student" else ""
        failed = not line.metrics
        return kinds.index(line.kind), failed or not line.ranked, place, name, line.steps or 0

    return sorted(lines, key=key)


def markdown(race: BenchmarkRunner, lines: Sequence[LeaderboardRow]) -> str:
    """The leaderboard as a page: students, the teacher beside them, and what failed."""
    bench = race.bench
    protocol = bench.reference().eval.protocol or "closed form"
    seeds = ", ".join(map(str, bench.seeds))
    parts = [
        "# Leaderboard",
        f"Every student was trained for {bench.budget}, with seeds {seeds}; protocol: {protocol}. "
        "± is the spread over seeds. Evaluations are samples through any network while training.",
        table([v for v in lines if v.kind == "student" and v.steps]),
    ]
    if any(v.not_held_out for v in lines):
        parts.append(f"{MARK} A network in the row's loss reads this figure: it is not held out.")
    if untrained := [v for v in lines if v.kind != "student"]:
        cost = "Evaluations are samples through any network for one picture."
        parts += ["## The teacher, untrained", cost, table(untrained)]
    if failed := {(v.name, k): why for v in lines for k, why in v.failed.items()}:
        items = [
            f"- {plain(name)}, seed {seed}: {plain(why)}" for (name, seed), why in failed.items()
        ]
        parts += ["## Failed", "\n".join(items)]
    return "\n\n".join(p for p in parts if p) + "\n"


def table(lines: Sequence[LeaderboardRow]) -> str:
    """Lines as a Markdown table with the columns that any of them has."""
    if not lines:
        return ""
    keys = catalogue.columns(dict.fromkeys(k for v in lines for k in v.metrics))
    timed = any("images_per_s" in v.metrics for v in lines)
    trained = any(v.wall_s is not None for v in lines)
    costed = any("evaluations" in v.metrics for v in lines)  # network evaluations of a picture
    heads = [
        "",
        "steps",
        *(["evaluations"] if costed else []),
        *map(catalogue.short, keys),
        *([catalogue.short("images_per_s")] if timed else []),
    ]
    heads += ["trained steps", "evaluations", "wall s", "memory GB"] if trained else []
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        cells = [plain(line.name), str(line.steps)]
        if costed:
            cells.append(
                f"{line.value('evaluations'):.4g}" if "evaluations" in line.metrics else ""
            )
        cells += [figure(line, k) for k in keys]
        if timed:
            speed = "images_per_s" in line.metrics
            cells.append(f"{line.value('images_per_s'):,.0f}" if speed else "")
        if trained:
            assert line.network_evaluations is not None and line.train_steps is not None
            cells += [f"{line.train_steps:,.0f}", f"{line.network_evaluations:,.0f}"]
            cells += [f"{line.wall_s:.0f}", f"{line.peak_memory_gb:.2f}"]
        rows.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def plain(text: str) -> str:
    """A text escaped so that Markdown shows it as it is, also in a table's cell."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(text, quote=False))


def figure(line: LeaderboardRow, key: str) -> str:
    """A mean, with its spread where there are several seeds."""
    if key not in line.metrics:
        return ""
    spread = f" ± {short(line.metrics[key]['spread'])}" if len(line.seeds) > 1 else ""
    return f"{short(line.value(key))}{spread}" + MARK * (key in line.not_held_out)


def short(value: float) -> str:
    """Three decimals, or two significant digits for smaller values."""
    return f"{value:.2g}" if 0 < abs(value) < 0.005 else f"{value:.3f}"
