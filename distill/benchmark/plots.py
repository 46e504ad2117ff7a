"""A leaderboard as plots: every point has its name in the margin; colours suit the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from distill.benchmark.leaderboard import LeaderboardRow, distance_of
from eval import catalogue
from teachers.errors import plural

# Okabe and Ito's palette (Color Universal Design, 2008), without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P", "X")  # of objectives, beside their colours
GREY, BLACK = "#767676", "#1a1a1a"
NAME = 0.21  # inches that a name takes
BEST = 20  # rows of the short picture of a long benchmark
LINES = 20  # the most rows whose lines an eye can follow; more are ranked


class Point(NamedTuple):
    """A point in an axis, and its name in the margin."""

    x: float
    y: float
    name: str
    colour: str


def plot(lines: Sequence[LeaderboardRow], out: Path) -> list[Path]:
    """Write every plot that the lines have metrics for; their paths."""
    import matplotlib as mpl

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
             "axes.edgecolor": GREY, "axes.titlesize": 10, "axes.titlelocation": "left",
             "xtick.color": BLACK, "ytick.color": BLACK, "grid.color": "#e6e6e6",
             "figure.dpi": 150, "savefig.bbox": "tight", "axes.axisbelow": True}  # fmt: skip
    lines = [
        replace(v, name=v.name.replace("$", r"\$")) for v in lines
    ]  # or matplotlib sets mathematics
    students = [v for v in lines if v.kind == "student" and v.steps]
    if not students:
        return []
    first = fewest(students)
    paths = []
    with mpl.rc_context(style):
        if any(v.steps != students[0].steps for v in students):
            paths += quality_by_steps(lines, out)
        paths.append(quality_by_cost(lines, first, out))
        if all("recall" in v.metrics for v in first):
            paths.append(diversity(lines, first, out))
        paths.append(cost(first, out))
    return paths


def fewest(students: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Each row's line at its fewest steps."""
    lines: dict[str, LeaderboardRow] = {}
    for line in sorted(students, key=lambda v: v.steps or 0):
        lines.setdefault(line.name, line)
    return list(lines.values())


def looks(lines: Sequence[LeaderboardRow]) -> dict[str | None, tuple[str, str]]:
    """A colour and a mark for each objective."""
    names = sorted({v.objective or "" for v in lines if v.kind == "student"})
    return {n: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, n in enumerate(names)}


def figure(names: int, width: float = 7.0, panels: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, tall enough for so many names in the margin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, max(4.0, NAME * names + 1.0)), layout="constrained")
    FigureCanvasAgg(fig)  # without pyplot: no window, no global state
    return fig, fig.subplots(1, panels, sharey=panels > 1)


def saved(fig: Any, path: Path) -> Path:
    fig.savefig(path)
    return path


def quality_by_steps(lines: Sequence[LeaderboardRow], out: Path) -> list[Path]:
    """Distance by the students' sampling steps: a line for each row, dashed for baselines.

    Many rows are ranked instead, and of very many there is a second picture of the best.
    """
    rows: dict[str, list[LeaderboardRow]] = {}
    most = max(v.steps or 0 for v in lines if v.kind == "student")
    few = [v for v in lines if v.steps and v.steps <= most and v.kind != "teacher"]
    for line in sorted(few, key=lambda v: v.steps or 0):
        rows.setdefault(line.name, []).append(line)
    if len(rows) > LINES:
        paths = [ranking(rows, lines, out / "quality-steps.png")]
        if len(rows) > 2 * BEST:
            paths.append(ranking(rows, lines, out / "quality-best.png", BEST))
        return paths
    return [lines_by_steps(rows, lines, few, out / "quality-steps.png")]


def lines_by_steps(
    rows: dict[str, list[LeaderboardRow]],
    lines: Sequence[LeaderboardRow],
    few: Sequence[LeaderboardRow],
    path: Path,
) -> Path:
    """Distance by sampling steps: a line for each row.

    Args:
        few: The lines of few steps, without the teacher's.
        path: The file to write.
    """
    fig, ax = figure(len(rows) + 1)
    look, points = looks(lines), []
    for name, row in rows.items():
        colour, mark = look.get(row[0].objective, (GREY, "."))
        x, y = [v.steps or 0 for v in row], [v.distance for v in row]
        dashed = "--" if row[0].kind == "baseline" else "-"
        ax.plot(x, y, dashed, marker=mark, color=colour, lw=1.2, ms=4.5, alpha=0.9)
        points.append(Point(x[-1], y[-1], name, colour))
    ax.set_xscale("log", base=2)
    steps = sorted({v.steps for v in few if v.steps})
    ax.set_xticks(steps, [str(k) for k in steps])
    ax.set_xlabel("sampling steps")
    scale_of_distance(ax, "Distance by sampling steps", distance_of(few[0].metrics))
    points += reference(ax, lines, None)
    in_margin(ax, points)
    return saved(fig, path)


def ranking(
    rows: dict[str, list[LeaderboardRow]],
    lines: Sequence[LeaderboardRow],
    path: Path,
    most: int | None = None,
) -> Path:
    """Distance by sampling steps with the names as an axis, the best on top: a dot for each count.

    Args:
        rows: By name, its lines of a few steps.
        path: The file to write.
        most: How many rows are shown, of the best; by default all.
    """
    order = sorted(rows.values(), key=lambda v: min(w.distance for w in v), reverse=True)
    shown = f"The best {most} of {len(order)}" if most else "Distance"
    order = order[-(most or len(order)) :]
    counts = sorted({v.steps for row in order for v in row if v.steps})
    fig, ax = figure(len(order) + 1, 8.4)
    for place, row in enumerate(order):
        x, untrained = [v.distance for v in row], row[0].kind == "baseline"
        ax.plot(x, [place] * len(x), color=GREY, lw=0.8, ls=":" if untrained else "-", zorder=1)
    for k, colour, mark in zip(counts, COLOURS, MARKS, strict=False):
        dots = [(v.distance, i) for i, row in enumerate(order) for v in row if v.steps == k]
        if dots:
            ax.plot(*zip(*dots, strict=True), mark, color=colour, ms=6, ls="", alpha=0.9,
                    label=f"{k} {plural(k, 'step')}")  # fmt: skip
    for line in lines:
        if line.kind == "teacher":
            name = f"{line.name}, {line.steps} steps"
            ax.axvline(line.distance, color=BLACK, lw=1, label=name, zorder=0)
    ax.set_yticks(range(len(order)), [row[0].name for row in order])
    for text, row in zip(ax.get_yticklabels(), order, strict=True):
        text.set_color(GREY if row[0].kind == "baseline" else BLACK)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.7, len(order) - 0.3)
    ax.set_xscale("log")
    numbered(ax.xaxis)
    ax.grid(axis="x", lw=0.6)
    ax.set_title(f"{shown} by sampling steps; grey names are the teacher without training")
    ax.set_xlabel(f"{catalogue.label(distance_of(order[0][0].metrics))}, lower is better")
    ax.legend(loc="center right", frameon=False)
    return saved(fig, path)


def quality_by_cost(
    lines: Sequence[LeaderboardRow], first: Sequence[LeaderboardRow], out: Path
) -> Path:
    """Distance in the fewest steps by the cost of training: time, or evaluations if they differ."""
    spent = [v.network_evaluations or 0 for v in first]
    timed = max(spent) <= 1.2 * min(spent)  # evaluations were the budget, and equal
    fig, ax = figure(len(first) + 2)
    look, points = looks(lines), []
    for line in first:
        colour, mark = look[line.objective]
        x = (line.wall_s if timed else line.network_evaluations) or 0.0
        y, spread = line.distance, line.metrics[distance_of(line.metrics)]["spread"]
        low = min(spread, 0.9 * y)  # a logarithmic axis has no zero
        ax.errorbar(x, y, [[low], [spread]], color=colour, marker=mark, ms=5.5, lw=1, capsize=2)
        points.append(Point(x, y, at(line), colour))
    ax.set_xlabel("training, seconds" if timed else "training, network evaluations")
    ax.set_xlim(0, 1.08 * max(p.x for p in points))
    title = "Distance by the cost of training (bars: spread of seeds)"
    scale_of_distance(ax, title, distance_of(first[0].metrics))
    points += reference(ax, lines, min(v.steps or 0 for v in first))
    in_margin(ax, points)
    return saved(fig, out / "quality-cost.png")


def diversity(lines: Sequence[LeaderboardRow], first: Sequence[LeaderboardRow], out: Path) -> Path:
    """Distance by recall and by coverage, in two panels that share names and the distance axis."""
    fig, axes = figure(len(first) + 2, 8.4, 2)
    look, points = looks(lines), []
    for ax, key in zip(axes, ("recall", "coverage"), strict=True):
        for line in first:
            colour, mark = look[line.objective]
            ax.plot(line.value(key), line.distance, mark, color=colour, ms=5.5)
            if key == "coverage":
                points.append(Point(line.value(key), line.distance, at(line), colour))
        name = catalogue.short(key)
        labelled = distance_of(first[0].metrics) if key == "recall" else ""
        scale_of_distance(ax, f"{name}: to the right is more diverse", labelled)
        ax.set_xlabel(name)
        references = reference(ax, lines, min(v.steps or 0 for v in first), key)
        points += references if key == "coverage" else []
    in_margin(axes[1], points)
    return saved(fig, out / "diversity.png")


def cost(first: Sequence[LeaderboardRow], out: Path) -> Path:
    """Wall time and peak memory of training, a bar for each row, the quickest on top."""
    order = sorted(first, key=lambda v: v.wall_s or 0, reverse=True)
    fig, axes = figure(len(order) + 1, 8.4, 2)
    look = looks(first)
    colours = [look[v.objective][0] for v in order]
    parts = (("training, seconds", "wall_s", "{:.0f}"),
             ("peak memory, GB", "peak_memory_gb", "{:.2f}"))  # fmt: skip
    for ax, (title, key, text) in zip(axes, parts, strict=True):
        values = [getattr(v, key) for v in order]
        text = "{:.1f}" if key == "wall_s" and max(values) < 10 else text
        bars = ax.barh([v.name for v in order], values, color=colours, height=0.62)
        ax.bar_label(bars, [text.format(v) for v in values], padding=3, color=BLACK)
        ax.set_title(title)
        ax.set_xlim(0, 1.16 * max(values))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
    return saved(fig, out / "cost.png")


def at(line: LeaderboardRow) -> str:
    """A row's name with the point's step count, unless the name has it."""
    steps = f"{line.steps} {plural(line.steps or 0, 'step')}"
    return line.name if steps in line.name else f"{line.name} ({steps})"


def scale_of_distance(ax: Any, title: str, key: str = "") -> None:
    """A logarithmic axis of distance, in plain numbers; `key` names the figure, if it is given."""
    ax.set_yscale("log")
    numbered(ax.yaxis)
    ax.grid(axis="y", lw=0.6)
    ax.set_title(title)
    if key:
        ax.set_ylabel(f"{catalogue.label(key)}, lower is better")


def numbered(axis: Any) -> None:
    """The numbers of a logarithmic axis in plain figures."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(LogLocator(subs=()))


def reference(
    ax: Any, lines: Sequence[LeaderboardRow], steps: int | None, key: str = ""
) -> list[Point]:
    """Horizontal lines at the distances of the teacher and its best baseline in at most `steps`.

    Args:
        key: A metric; its value is marked on the line.

    Returns:
        The points to name.
    """
    points = []
    full = [v for v in lines if v.kind == "teacher"]
    few = [v for v in lines if v.kind == "baseline" and steps and (v.steps or 0) <= steps]
    best = sorted(few, key=lambda v: v.distance)[:1]
    for line, colour, style in [(v, BLACK, "-") for v in full] + [(v, GREY, "--") for v in best]:
        y = line.distance
        ax.axhline(y, color=colour, lw=1, ls=style, zorder=1)
        left, x = ax.get_xlim()
        # the value of a collapsed sampler would stretch the axis
        if key in line.metrics and (line.kind == "teacher" or line.value(key) > left):
            x = line.value(key)
            ax.plot(x, y, "*", color=colour, ms=9)
        name = at(line) if line.kind == "teacher" else f"teacher untrained, {at(line)}"
        points.append(Point(x, y, name, colour))
    return points


def in_margin(ax: Any, points: Sequence[Point]) -> None:
    """Write every name right of the axes, without overlaps, and a thin line to its point."""
    ax.figure.canvas.draw()  # computes the limits
    low, high = ax.get_ylim()
    right = ax.get_xlim()[1]
    points = sorted(points, key=lambda p: p.y)
    places = [ax.transAxes.inverted().transform(ax.transData.transform((p.x, p.y)))[1]
              for p in points]  # fmt: skip
    gap = NAME / (ax.figure.get_figheight() - 1.0)
    for p, y in zip(points, spread_out(places, gap), strict=True):
        ax.annotate(
            p.name, (p.x, p.y), xytext=(1.09, y), textcoords="axes fraction", color=p.colour,
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": p.colour, "lw": 0.5, "alpha": 0.55,
                        "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
    ax.set_ylim(low, high)
    ax.set_xlim(right=right)


def spread_out(
    places: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0
) -> list[float]:
    """Move rising places by the least sum of squares so that neighbours are `gap` apart.

    They stay within `low` and `high`, or start at `low` where there is no room.
    """
    blocks: list[list[float]] = []  # places minus their gaps, in blocks whose means must rise
    for i, place in enumerate(places):
        blocks.append([place - i * gap])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    most = high - (len(places) - 1) * gap
    level = [max(low, min(most, _mean(b))) for b in blocks for _ in b]
    return [v + i * gap for i, v in enumerate(level)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
