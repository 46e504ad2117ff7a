"""What `distill compat` shows: a table on the terminal, and a picture of the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from distill.grids import save_table
from eval import catalogue
from teachers.errors import plural

SHOWN = 3  # pictures in a cell
NAME = 24  # letters of a LoRA's name


def table(tree: Mapping[str, Any]) -> Group:
    """The figures by LoRA and strength, then their mean and the worst."""
    teacher = tree["teacher"]
    score = tree["prompt_score"]
    title = (
        f"student in {tree['steps']} {plural(tree['steps'], 'step')}, teacher in "
        f"{teacher['steps']} of {teacher['solver']}; {tree['samples']} pictures each"
    )
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    overlaps = any((r["overlap"] or {}).get("layers") for r in tree["rows"])
    pairs = ["saturation", "clipped", *["prompt_score"] * bool(score)]
    heads = {"clipped": "clipped %", "prompt_score": catalogue.narrow(score) if score else ""}
    result.add_column("LoRA", overflow="fold", max_width=NAME)
    for head in ("at", "shift", "cosine", *(heads.get(p, p) for p in pairs)):
        result.add_column(head, justify="right", no_wrap=True)
    if overlaps:
        result.add_column("overlap", justify="right", no_wrap=True)
    both = [both_of(tree["plain"], p) for p in pairs]
    result.add_row("none", "", "", "", *both)
    for row in tree["rows"]:
        cells = [f"{row['strength']:g}", number(row["shift_ratio"]), number(row["shift_cosine"])]
        cells += [both_of(row, p) for p in pairs]
        if overlaps:
            cells.append(number((row["overlap"] or {}).get("mean")))
        result.add_row(row["lora"], *cells)
    if len(tree["rows"]) > 1:
        result.add_section()
        for name in ("mean", "worst"):
            result.add_row(name, "", *summary_cells(tree[name], pairs))
    return Group(result, notes(tree, overlaps))


def summary_cells(part: Mapping[str, Any], pairs: list[str]) -> list[str]:
    """The cells of "mean" or "worst": of pairs, the student's difference to the teacher."""
    values = {k: v["value"] if isinstance(v, dict) else v for k, v in part.items()}
    return [
        number(values.get("shift_ratio")),
        number(values.get("shift_cosine")),
        *("" if p not in values else signed(p, values[p]) for p in pairs),
    ]


def both_of(row: Mapping[str, Any], key: str) -> str:
    """The teacher's value, then the student's."""
    scale = 100 if key == "clipped" else 1
    form = ".1f" if key == "clipped" else ".3f"
    return "→".join(f"{row[who][key] * scale:{form}}" for who in ("teacher", "student"))


def signed(key: str, value: float) -> str:
    places, value = (1, 100 * value) if key == "clipped" else (3, value)
    return f"{round(value, places) + 0.0:+.{places}f}"  # without -0.0


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def notes(tree: Mapping[str, Any], overlaps: bool) -> Table:
    """What the columns mean, and what one may expect of them."""
    result = Table.grid(padding=(0, 2))
    result.add_row("at", "strength of the LoRA")
    result.add_row("shift", "of the features' mean by the LoRA: the student's over the teacher's")
    own = [v for r in tree["rows"] if (v := r["teacher_halves_cosine"]) is not None]
    ceiling = f"; of the teacher's own in two halves of its pictures {min(own):.2f}" if own else ""
    result.add_row("cosine", f"of these two shifts{ceiling}")
    result.add_row("a→b", "the teacher's, the student's; mean and worst: by how much it differs")
    if overlaps:
        rows = [r["overlap"] for r in tree["rows"] if (r["overlap"] or {}).get("layers")]
        result.add_row(
            "overlap",
            f"of its inputs with the student's LoRA; {rows[0]['by_chance']:.2f} by chance",
        )
    result.add_row("features", tree["features"])
    return result


def save(tree: Mapping[str, Any], pictures: Mapping[str, Mapping[Any, Tensor]], path: Path) -> None:
    """Some pictures of each model: a row for each LoRA and strength."""
    students = f"student, {tree['steps']} {plural(tree['steps'], 'step')}"
    variants = [k for k in pictures["teacher"] if k is not None]
    distinct = min(tree["samples"], len(tree["prompts"]))
    some = [i * distinct // SHOWN for i in range(SHOWN)]  # prompts repeat after these
    cells = [
        [of[k][some] for of in (pictures["teacher"], pictures["student"]) for k in (None, variant)]
        for variant in variants
    ]
    rows = [f"{row['lora'][:NAME]} {row['strength']:g}" for row in tree["rows"]]
    save_table(cells, path, rows, ["teacher", "teacher + LoRA", students, "student + LoRA"])
