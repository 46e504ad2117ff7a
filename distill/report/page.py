"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from distill.files import write
from distill.publish.card import (
    Facts,
    cost,
    facts_of,
    limitations,
    require_finished,
    snippet,
    teacher_name,
)
from distill.publish.results_table import (
    SPREAD,
    Row,
    best,
    headline_figure,
    many,
    not_held_out,
    rows_of,
    steps_of,
)
from distill.publish.tuning import HEADS
from distill.report import curves
from distill.report.charts import chart
from eval import catalogue
from teachers.errors import UserError, intact

if TYPE_CHECKING:
    from jinja2 import Template

PICTURES = "final"  # the folder in samples/ with the last grids of teacher and student
SPEED = "speed.json"  # of `distill eval RUN --speed --json RUN/speed.json`
CURVES = ("loss", "grad_norm")  # ends of the series shown first; the others are folded


class Picture(NamedTuple):
    """A grid of samples: its sampler, and the image as a data URI."""

    name: str
    uri: str


def report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run, by default as `report.html` in its folder.

    Raises:
        UserError: the run is not finished, or its records are damaged.
    """
    require_finished(run)
    out = run / "report.html" if out is None else out
    write(out, render(run))
    return out


@cache
def template() -> Template:
    """The page's template."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = files("distill.report").joinpath("report.html").read_text("utf-8")
    return environment.from_string(page)


def render(run: Path) -> str:
    """The page as HTML."""
    summary = read_summary(run)
    facts = facts_of(run / "student", summary, str(run / "student"))
    recipe = curves.recipe_tree(run)
    with intact(run / "recipe.yaml"):
        weights, batch = trained_weights(recipe), recipe["train"]["batch"]
    with intact(run / "summary.json"):
        sentence, metrics, note = verdict(summary), table(summary), protocol(summary)
        head = headline(facts, summary, weights, batch)
        versions: dict[str, Any] = {**summary.get("versions", {})}
    series, reference = curves.series(run), curves.match(recipe)
    bands = reference.bands if reference else {}
    charts = {name: chart(name, values, bands.get(name)) for name, values in series.items()}
    first = {k: v for k, v in charts.items() if k.endswith(CURVES)}
    images = pictures(run)
    return template().render(
        title=f"{teacher_name(facts)} in {steps_of(facts.counts)}",
        verdict=sentence,
        facts=head,
        teacher=[p for p in images if p.name.startswith("teacher")],
        student=[p for p in images if p.name.startswith("student")],
        prompts=prompts(run),
        table=metrics,
        protocol=note,
        timings=timings(run),
        tuning=facts.tuning,
        tuning_heads=HEADS,
        curves=first,
        more={k: v for k, v in charts.items() if k not in first},
        reference=reference,
        deviations=curves.deviations(series, reference) if reference else [],
        compared=curves.shared_steps(series, reference) if reference else 0,
        snippet=snippet(facts),
        limitations=[li[2:] for li in limitations(facts).splitlines() if li.startswith("- ")],
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        versions=versions,
        device=summary.get("device", "not recorded"),
    )


def read_summary(run: Path) -> dict[str, Any]:
    """A run's summary.json.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{run}: summary.json is damaged; write it again with `distill run … --resume`"
        ) from None


def verdict(summary: Mapping[str, Any]) -> str:
    """The result in one sentence: the student at its best step count, beside its teacher."""
    metrics = summary.get("metrics")
    if not metrics:
        return "Not measured: the recipe has no evaluation protocol."
    row, held = first_row(metrics), summary.get("held_out")
    if (steps := best(metrics, held)) is None:
        return f"Measured by protocol {row['protocol']}. {not_held_out(summary)}".strip()
    key, student = headline_figure(metrics, held), metrics["student"][steps]
    assert key is not None
    value = " ± ".join(filter(None, figure(student, key)))
    start = f"In {steps_of([int(steps)])} the student's {catalogue.label(key)} is {value}"
    if (teacher := metrics.get("teacher")) is None:
        return f"{start}; the teacher was not measured."
    ratio = student[key] / teacher[key]
    speed = student["images_per_s"] / teacher["images_per_s"]
    few = metrics.get("teacher_few", {}).get(steps)
    end = f" The teacher's in {steps_of([int(steps)])} is {few[key]:.3g}." if few else ""
    return (
        f"{start}: {ratio:.2f}× the teacher's in {steps_of([teacher['steps']])} "
        f"({teacher[key]:.3g}), at {speed:.1f}× its speed.{end}"
    )


def first_row(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The student's metrics at one of its step counts; all rows have the same protocol."""
    for row in metrics["student"].values():
        return row
    raise KeyError("student")


def figure(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A metric and its spread over seeds; no spread if there is one seed."""
    value = catalogue.written(key, row[key])
    if row.get("seeds", 1) <= 1:
        return value, ""
    return value, catalogue.written(key, row.get("spread", {}).get(key, 0.0))


def trained_weights(recipe: Mapping[str, Any]) -> str:
    """Which weights of the student were trained."""
    if adapters := recipe.get("adapters"):
        return f"{adapters['kind']} adapters of rank {adapters['rank']}"
    return "all weights"


def headline(facts: Facts, summary: Mapping[str, Any], weights: str, batch: int) -> dict[str, str]:
    """The facts at the top of the page, by name."""
    return {
        "Teacher": f"{teacher_name(facts)}, {summary.get('guidance', 'unguided')}",
        "Objective": facts.objective,
        **({"Features in the loss": v} if (v := summary.get("loss_features")) else {}),
        **(
            {"Networks that training read": ", ".join(v)}
            if (v := summary.get("used_networks"))
            else {}
        ),
        "Trained": weights,
        "Training": f"{summary['steps']:,} steps of {batch} samples, seed {summary.get('seed', 0)}",
        "Cost": cost(summary),
    }


def pictures(run: Path) -> list[Picture]:
    """The last grids of teacher and student; without them, the newest samples of training."""
    folder = run / "samples" / PICTURES
    paths = {
        (who, steps): path
        for who in ("teacher", "student")
        for steps, path in grids(folder, rf"{who}-(\d+)")
    }
    if not paths:
        for steps, path in grids(run / "samples", r"step-\d+-at-(\d+)"):  # the newest comes last
            paths["student", steps] = path
    return [
        Picture(
            f"{who}, {steps_of([steps])}",
            "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        )
        for (who, steps), path in sorted(paths.items())
    ]


def grids(folder: Path, name: str) -> Iterator[tuple[int, Path]]:
    """Step counts and files of the grids with such names in a folder; other files are skipped."""
    for path in sorted(folder.glob("*.png")):
        if match := re.fullmatch(name, path.stem):
            yield int(match[1]), path


def prompts(run: Path) -> list[str]:
    """The prompts or labels of the images, row by row; empty for an unconditional student.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "samples" / PICTURES / "prompts.json"
    if not path.is_file():
        return []
    with intact(path):
        names = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(names, list):
            raise TypeError("prompts are a list")
    return [str(p) for p in names]


def table(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The table of metrics: heads, and rows of a name, whether it is the student, and cells."""
    metrics = summary.get("metrics")
    if not metrics:
        return {}
    full = metrics.get("teacher")
    keys = catalogue.columns(first_row(metrics))

    def cells(row: Row) -> list[tuple[str, str]]:
        speed = row.figures["images_per_s"]
        speed_up = [(f"{speed / full['images_per_s']:.1f}×", "")] if full else []
        values = [(f"{row.evaluations:.4g}", ""), *(figure(row.figures, k) for k in keys)]
        return [*values, (f"{speed:,.0f}", ""), *speed_up]

    heads = ["evaluations", *map(catalogue.label, keys), catalogue.label("images_per_s")]
    return {
        "heads": heads + ["speed"] * (full is not None),
        "rows": [(row.name, row.is_student, cells(row)) for row in rows_of(metrics)],
    }


def timings(run: Path) -> dict[str, Any]:
    """The table of the run's speed.json: heads, rows as in `table`, and the machine.

    Raises:
        UserError: the file is damaged.
    """
    path = run / SPEED
    if not path.is_file():
        return {}
    rows = []
    try:
        speed = json.loads(path.read_text(encoding="utf-8"))["speed"]
        for who, is_student in (("student", True), ("against", False)):
            for steps, row in speed.get(who, {"steps": {}})["steps"].items():
                name = f"{'student' if is_student else 'teacher'}, {steps_of([int(steps)])}"
                for timing in (row["single"], row["saturated"]):
                    cells = [f"{row['evaluations']:,}", f"{timing['batch']:,}"]
                    cells += [f"{timing[k]:,.1f}" for k in ("latency_ms", "latency_p90_ms")]
                    cells += [f"{timing['images_per_s']:,.4g}", f"{timing['peak_memory_gb']:.2f}"]
                    rows.append((name, is_student, cells))
        machine = f"{speed['student']['device']}, {speed['student']['dtype']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged; write it again with distill eval --speed") from None
    heads = ["evaluations", "batch", "ms", "p90 ms", "images/s", "GB"]
    return {"heads": heads, "rows": rows, "machine": machine}


def protocol(summary: Mapping[str, Any]) -> str:
    """The note on how the metrics were measured."""
    metrics = summary.get("metrics")
    if not metrics:
        return ""
    full, student = metrics.get("teacher"), first_row(metrics)
    teacher_seeds = f", {full['seeds']} for the teacher" if full else ""
    seeds = f"{many(student['seeds'], 'seed')} for the student{teacher_seeds}"
    few = ""
    if "teacher_few" in metrics:
        few = (" The teacher's few steps use its own timesteps; searched timesteps may do better "
               "without training (distill eval --schedule).")  # fmt: skip
    how = f"Protocol {student['protocol']}: {student['n']:,} samples per seed; {seeds}; {SPREAD}."
    return " ".join(filter(None, (how + few, not_held_out(summary))))
