"""A run's report: one self-contained page with the verdict, pictures, curves, figures and cost."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill.files import write
from distill.publish.card import (
    Facts,
    cost,
    facts_of,
    limitations,
    named,
    require_finished,
    snippet,
)
from distill.publish.results_table import SPREAD, Row, best, many, rows_of, steps_of
from distill.report import curves
from distill.report.charts import chart
from eval import catalogue
from teachers.errors import UserError, intact

PICTURES = "final"  # under samples/: teacher and student on the same noise, written as a run ends
SPEED = "speed.json"  # what `distill eval RUN --speed --json RUN/speed.json` leaves
CURVES = ("loss", "grad_norm")  # the series that are shown first; the others can be unfolded


class Picture(NamedTuple):
    """A grid of samples: what drew it, and the image as a data URI."""

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


def render(run: Path) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    summary = read_summary(run)
    facts = facts_of(run / "student", summary, str(run / "student"))
    recipe = curves.tree_of(run)
    with intact(run / "recipe.yaml"):
        learnt, batch = what_learnt(recipe), recipe["train"]["batch"]
    with intact(run / "summary.json"):
        said, figures, how = verdict(summary), table(summary), protocol(summary)
        head = headline(facts, summary, learnt, batch)
        versions: dict[str, Any] = {**summary.get("versions", {})}
    found, reference = curves.series(run), curves.match(recipe)
    bands = reference.bands if reference else {}
    drawn = {name: chart(name, values, bands.get(name)) for name, values in found.items()}
    first = {k: v for k, v in drawn.items() if k.endswith(CURVES)}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = files("distill.report").joinpath("report.html").read_text("utf-8")
    template = environment.from_string(page)
    return template.render(
        title=f"{named(facts)} in {steps_of(facts.counts)}",
        verdict=said,
        facts=head,
        teacher=[p for p in pictures(run) if p.name.startswith("teacher")],
        student=[p for p in pictures(run) if p.name.startswith("student")],
        prompts=prompts(run),
        table=figures,
        protocol=how,
        timings=timings(run),
        curves=first,
        more={k: v for k, v in drawn.items() if k not in first},
        reference=reference,
        deviations=curves.deviations(found, reference) if reference else [],
        compared=curves.compared(found, reference) if reference else 0,
        snippet=snippet(facts),
        limitations=[li[2:] for li in limitations(facts).splitlines() if li.startswith("- ")],
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        versions=versions,
        device=summary.get("device", "not recorded"),
    )


def read_summary(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{run}: summary.json is damaged; run it again with --resume") from None


def verdict(summary: Mapping[str, Any]) -> str:
    """What came of it, in one sentence: the best of the student's step counts by distance."""
    metrics = summary.get("metrics")
    if not metrics:
        return "Not measured: the recipe names no evaluation protocol."
    any_row = first_row(metrics)
    if (steps := best(metrics)) is None:
        return f"Measured by protocol {any_row['protocol']}."
    key, found = catalogue.columns(any_row)[0], metrics["student"][steps]
    said = " ± ".join(filter(None, figure(found, key)))
    begins = f"In {steps_of([int(steps)])} the student's {catalogue.label(key)} is {said}"
    if (full := metrics.get("teacher")) is None:
        return f"{begins}; the teacher was not measured."
    ratio = found[key] / full[key]
    speed = found["images_per_s"] / full["images_per_s"]
    alone = metrics.get("teacher_few", {}).get(steps)
    without = f"; the teacher in {steps_of([int(steps)])} has {alone[key]:.3g}" if alone else ""
    return (
        f"{begins}, "
        f"{ratio:.2f}× that of the teacher's {full['steps']} ({full[key]:.3g}), "
        f"at {speed:.1f}× its speed{without}."
    )


def first_row(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The student's figures at one of its step counts; all rows are of one protocol."""
    for row in metrics["student"].values():
        return row
    raise KeyError("student")


def figure(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A figure, and its spread over seeds where there was more than one."""
    value = catalogue.written(key, row[key])
    if row.get("seeds", 1) <= 1:
        return value, ""
    return value, catalogue.written(key, row.get("spread", {}).get(key, 0.0))


def what_learnt(recipe: Mapping[str, Any]) -> str:
    """Which of the weights."""
    if adapters := recipe.get("adapters"):
        return f"{adapters['kind']} adapters of rank {adapters['rank']}"
    return "all weights"


def headline(facts: Facts, summary: Mapping[str, Any], learnt: str, batch: int) -> dict[str, str]:
    """What was distilled, and how."""
    return {
        "Teacher": f"{named(facts)}, {summary.get('guidance', 'unguided')}",
        "Objective": facts.objective,
        "What learnt": learnt,
        "Training": f"{summary['steps']:,} steps of {batch}, seed {summary.get('seed', 0)}",
        "Cost": cost(summary),
    }


def pictures(run: Path) -> list[Picture]:
    """The last grids of teacher and student; the newest samples where a run kept no others."""
    folder = run / "samples" / PICTURES
    found = {
        (who, steps): path
        for who in ("teacher", "student")
        for steps, path in grids(folder, rf"{who}-(\d+)")
    }
    if not found:
        for steps, path in grids(run / "samples", r"step-\d+-at-(\d+)"):  # a newer one replaces
            found["student", steps] = path
    return [
        Picture(
            f"{who}, {steps_of([steps])}",
            "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        )
        for (who, steps), path in sorted(found.items())
    ]


def grids(folder: Path, name: str) -> Iterator[tuple[int, Path]]:
    """Step counts and files of a folder's grids of such names; other files are passed over."""
    for path in sorted(folder.glob("*.png")):
        if found := re.fullmatch(name, path.stem):
            yield int(found[1]), path


def prompts(run: Path) -> list[str]:
    """What the pictures were asked for, row by row; empty for unconditional ones.

    Raises:
        UserError: they are damaged.
    """
    path = run / "samples" / PICTURES / "prompts.json"
    if not path.is_file():
        return []
    with intact(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise TypeError("prompts are a list")
    return [str(p) for p in found]


def table(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures: heads, and a row for each sampler with whether it is the student's."""
    metrics = summary.get("metrics")
    if not metrics:
        return {}
    full = metrics.get("teacher")
    keys = catalogue.columns(first_row(metrics))

    def cells(row: Row) -> list[tuple[str, str]]:
        speed = row.figures["images_per_s"]
        over = [(f"{speed / full['images_per_s']:.1f}×", "")] if full else []
        found = [(f"{row.evaluations:.4g}", ""), *(figure(row.figures, k) for k in keys)]
        return [*found, (f"{speed:,.0f}", ""), *over]

    heads = ["evaluations", *map(catalogue.label, keys), catalogue.label("images_per_s")]
    return {
        "heads": heads + ["speed-up"] * (full is not None),
        "rows": [(row.name, row.ours, cells(row)) for row in rows_of(metrics)],
    }


def timings(run: Path) -> dict[str, Any]:
    """What the run's speed.json says: heads, rows as the figures have them, and the machine.

    Raises:
        UserError: it is damaged.
    """
    path = run / SPEED
    if not path.is_file():
        return {}
    rows = []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["speed"]
        for who, own in (("student", True), ("against", False)):
            for steps, row in found.get(who, {"steps": {}})["steps"].items():
                name = f"{'student' if own else 'teacher'}, {steps_of([int(steps)])}"
                for timing in (row["single"], row["saturated"]):
                    cells = [f"{row['evaluations']:,}", f"{timing['batch']:,}"]
                    cells += [f"{timing[k]:,.1f}" for k in ("latency_ms", "latency_p90_ms")]
                    cells += [f"{timing['images_per_s']:,.4g}", f"{timing['peak_memory_gb']:.2f}"]
                    rows.append((name, own, cells))
        machine = f"{found['student']['device']}, {found['student']['dtype']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged; write it anew by distill eval --speed") from None
    heads = ["evaluations", "batch", "ms", "90 % within ms", "images/s", "GB"]
    return {"heads": heads, "rows": rows, "machine": machine}


def protocol(summary: Mapping[str, Any]) -> str:
    metrics = summary.get("metrics")
    if not metrics:
        return ""
    full, student = metrics.get("teacher"), first_row(metrics)
    taught = f", {full['seeds']} for the teacher" if full else ""
    seeds = f"{many(student['seeds'], 'seed')} for the student{taught}"
    few = ""
    if "teacher_few" in metrics:
        few = (" The teacher's few steps are at its usual times; searched ones may do better, "
               "untrained (distill eval --schedule).")  # fmt: skip
    figures = f"Protocol {student['protocol']}: {student['n']:,} samples a seed; {seeds}; {SPREAD}."
    return figures + few
