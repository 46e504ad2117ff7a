"""The terminal: lines, progress bars and tables of results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rich import box
from rich import progress as bars
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.speed import Speed
from eval import catalogue
from teachers.errors import printable

T = TypeVar("T")


class PipeSafeConsole(Console):
    """Becomes silent when its stream is closed or full, so that a run goes on without it."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except (OSError, ValueError):  # a full disk, or a closed file
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if self.stderr:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open until exit
        else:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


out = PipeSafeConsole(highlight=False, markup=False)
err = PipeSafeConsole(
    highlight=False, markup=False, stderr=True, quiet=os.environ.get("RANK", "0") != "0"
)


def print_notice(line: str) -> None:
    """Print what a user should know but need not act on: one line on stderr."""
    err.print(f"distill: {printable(line)}", soft_wrap=True, markup=False)


def print_line(line: str) -> None:
    """Print a line on stdout, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        out.print(line, soft_wrap=True, markup=False)


def spinner(line: str) -> AbstractContextManager[Any]:
    """Show a line with a spinner on stderr until the block ends, on a terminal only."""
    return err.status(line)


@contextmanager
def sampling_bar(task: str, total: float) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr until the block ends, on a terminal only.

    Yields:
        A function that takes the number of samples drawn so far.
    """
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        row = bar.add_task(task, total=total)
        yield lambda n: bar.update(row, completed=n)


def consume_with_bar(counts: Iterable[int], total: int, task: str) -> None:
    """Run through `counts`, how many of `total` items are done so far, with a bar on a terminal."""
    print_line(task)
    with count_bar() as bar:
        row = bar.add_task("", total=total)
        for count in counts:
            bar.update(row, completed=count)


def with_bar(
    items: Iterable[T], total: int, task: str, weight: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Iterate over the items with a bar on a terminal; `weight` is an item's share of `total`."""
    print_line(task)
    with count_bar() as bar:
        row = bar.add_task("", total=total)
        for item in items:
            yield item
            bar.advance(row, weight(item))


def count_bar() -> bars.Progress:
    """A bar with the count, the total and the time left; invisible unless stdout is a terminal."""
    columns = (bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
    live = out.is_terminal and os.environ.get("RANK", "0") == "0"
    return bars.Progress(*columns, console=out, disable=not live)


def time_left(seconds: float) -> str:
    """ "about 3 min left": in the largest unit of which there are two or more."""
    units = ((172_800, 86_400, "days"), (7200, 3600, "h"), (120, 60, "min"), (0, 1, "s"))
    size, unit = next((size, unit) for least, size, unit in units if seconds >= least)
    return f"about {seconds / size:.0f} {unit} left"


class TrainingBar(bars.Progress):
    """A bar, and the figures of the last logged step below it."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures, style="dim")


class Progress:
    """The progress of training: a bar on a terminal, else a line at each logged step.

    Args:
        steps: Of the whole run.
        done: Steps finished before this process started.
        shown: False on all ranks but 0.
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.steps, self.shown, self.live = steps, shown, shown and out.is_terminal
        self.first, self.start = done, time.monotonic()
        self.pace: float | None = None  # seconds of a step, once training is steady
        self.bar = TrainingBar(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[left]}"),
            console=out,
            disable=not self.live,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, left="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        if self.live:
            self.bar.update(self.task, completed=step, left=self.left(step))

    def show(self, step: int, values: dict[str, float], speed: Speed | None = None) -> None:
        """Show the losses of this step, and the speed where it is known."""
        losses = [f"{k.split('/')[0]} {v:.4g}" for k, v in values.items() if k.endswith("/loss")]
        figures = "  ".join([*losses, *([] if speed is None else [speed.text()])])
        self.pace = None if speed is None else speed.seconds
        left = self.left(step)
        if self.live:
            self.bar.figures = figures
            self.bar.update(self.task, completed=step, left=left)
        elif self.shown:
            line = f"step {step:>{len(str(self.steps))}}/{self.steps}  {figures}"
            out.print("  ".join(filter(None, [line, left])), soft_wrap=True)

    def left(self, step: int) -> str:
        """How long the remaining steps take, at the last known speed or else the average so far.

        Empty if unknown.
        """
        if not self.first < step < self.steps:
            return ""
        pace = self.pace or (time.monotonic() - self.start) / (step - self.first)
        return time_left(pace * (self.steps - step))

    def print_above(self, line: str) -> None:
        """Print a line above the bar."""
        if self.shown and line:
            self.bar.console.print(line, soft_wrap=True)


NAME = 14  # the least width of the names of rows; longer names are wrapped


def results_table(title: str, rows: dict[str, dict[str, Any]], base: str | None = None) -> Group:
    """Every main figure of the rows, and the speed of each over that of the row `base`.

    Columns that do not fit beside one another on the terminal are in a further table below.
    """
    columns = columns_of(rows, base)
    room = out.width - min(NAME, max(map(len, rows)))
    tables, left = list[list[str]](), 0
    for head, cells in columns.items():
        width = 2 + max(map(len, (head, *cells)))
        if not tables or width > left:
            tables.append([])
            left = room
        tables[-1].append(head)
        left -= width
    parts = []
    for heads in tables or [[]]:
        table = Table(
            title=None if parts else title,
            title_justify="left", box=None, pad_edge=False, header_style="bold",
        )  # fmt: skip
        table.add_column("sampler")
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for i, name in enumerate(rows):
            table.add_row(name, *(columns[head][i] for head in heads))
        parts.append(table)
    return Group(*parts)


def columns_of(rows: dict[str, dict[str, Any]], base: str | None) -> dict[str, list[str]]:
    """The cells of the columns by their heads: costs, figures, speed."""

    def cells(key: str, spread: bool = False) -> list[str]:
        texts = [catalogue.written(key, row[key]) if key in row else "" for row in rows.values()]
        if spread:
            for i, row in enumerate(rows.values()):
                if row.get("seeds", 1) > 1:
                    texts[i] += f" ±{catalogue.written(key, row['spread'][key])}"
        return texts

    first, *others = rows.values()
    figures = [k for k in catalogue.columns(first) if all(k in row for row in others)]
    keys = ["evaluations"] if any("evaluations" in row for row in rows.values()) else []
    keys += [*figures, *["images_per_s"] * all("images_per_s" in row for row in rows.values())]
    columns: dict[str, list[str]] = {}
    for key in keys:
        head = catalogue.narrow(key)  # which figures of one name but other settings share
        head = catalogue.label(key) if head in columns else head
        columns[head] = cells(key, key == next(iter(figures), None))
    if base is not None:
        speed = [row["images_per_s"] / rows[base]["images_per_s"] for row in rows.values()]
        columns["speed"] = [f"{v:.1f}×" for v in speed]
    return columns


def memory_text(gb: float) -> str:
    """Memory in GB, or in MB where that says more."""
    return f"{gb:.2f} GB" if gb >= 0.1 or not gb else f"{1e3 * gb:.2g} MB"


def hours_text(hours: float) -> str:
    """A time in hours, or in seconds where it is less than six minutes."""
    return f"{hours:.2g} h" if hours >= 0.1 else f"{3600 * hours:.2g} s"


def plan_table(tree: dict[str, Any], memory: float, reserve: float) -> Table:
    """A plan as a table: memory by part, then compute, time and cost.

    Args:
        memory: Of the GPU, in GB.
        reserve: Of that, what CUDA itself takes, in GB.
    """
    title = f"estimate for {tree['gpu']}, batch {tree['batch']}"
    note = f"{tree['share_of_peak']:.0%} of the card's rate is {tree['share_source']}"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, pad_edge=False,
        caption=note, caption_justify="left",
    )  # fmt: skip
    table.add_column("memory, time and cost")
    table.add_column("estimate", justify="right")
    for name, size in tree["parts_gb"].items():
        table.add_row(name, memory_text(size))
    table.add_section()
    peak, verdict = tree["peak_gb"], "fits" if tree["fits"] else "does not fit"
    table.add_row("peak", memory_text(peak))
    if tree["build_gb"] > tree["peak_gb"]:
        table.add_row("peak before step 0: encoders and a rehearsal", memory_text(tree["build_gb"]))
    if tree["grids_gb"] > tree["peak_gb"]:
        table.add_row("peak between steps: sample grids", memory_text(tree["grids_gb"]))
    peak = max(tree[key] for key in ("peak_gb", "build_gb", "grids_gb"))
    table.add_row(
        f"peak, and {reserve:g} GB for CUDA itself",
        f"{peak + reserve:.2f} of {memory:g} GB: {verdict}",
    )
    table.add_row(
        "weights and optimizer state",
        f"{tree['bytes_per_base_param']:.2f} bytes per teacher parameter",
    )
    if tree["encoders_gb"]:
        table.add_row("encoders, only before training", memory_text(tree["encoders_gb"]))
    if tree["host_gb"]:
        table.add_row("optimizer state in host memory", memory_text(tree["host_gb"]))
    table.add_section()
    if (count := tree.get("student_params")) is not None:
        weights, work = count / tree["base_params"], tree["student_work"]
        table.add_row(
            "student's network, of the teacher's",
            f"{weights:.0%} of the weights, {work:.0%} of the work",
        )
    samples = ", ".join(f"{k} {v:g}" for k, v in tree["evaluations_per_step"].items() if v)
    table.add_row("evaluations per step", samples)
    table.add_row("compute per step", f"{tree['tflop_per_step']:.3g} TFLOP")
    share = f"{tree['share_of_peak']:.0%} of the card's rate"
    table.add_row(f"1,000 steps at {share}", hours_text(tree["hours_per_1k_steps"]))
    table.add_row("rent of 1,000 steps", f"${tree['dollars_per_1k_steps']:.2f}")
    return table


def speed_table(who: str, speed: dict[str, Any]) -> Group:
    """The speed of a sampler at each step count, one image at a time and in large batches."""
    threads = f", {speed['threads']} threads" if speed["memory"].startswith("of") else ""
    line = f"{who}, from prompts to images: {speed['device']}, {speed['dtype']}{threads}"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("steps", "evaluations", "batch", "ms", "p90 ms", "img/s", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for steps, row in speed["steps"].items():
        for kind in ("single", "saturated"):
            timing = row[kind]
            rate = timing["images_per_s"]
            table.add_row(
                steps,
                str(row["evaluations"]),
                str(timing["batch"]),
                f"{timing['latency_ms']:,.1f}",
                f"{timing['latency_p90_ms']:,.1f}",
                f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
                f"{timing['peak_memory_gb']:.2f}",
            )
    return Group(Text(line), table)
