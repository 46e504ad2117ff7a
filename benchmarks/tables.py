"""Write the measured tables of README and docs from the run summaries in docs/results.

    python benchmarks/tables.py [--check]

A figure in those tables is one that a run left in its summary.json; `--check` only says whether the
files are up to date, which a test asks.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from boards import right, students, untrained

from teachers.text import plural

ROOT = Path(__file__).parent.parent
# The method, its paper, file, recipe and data, and its row in the benchmark of the digits.
DMD2, CM = "Yin et al. 2024, arXiv:2405.14867", "consistency.py"
METHODS = {
    "DMD2": ("DMD2", DMD2, "dmd2.py", "dmd2", "critic only"),
    "DMD2, 4 steps": ("DMD2, four steps", "the same", "dmd2.py", "dmd2-4step", "critic only"),
    "SiD α = 1": ("SiD", "Zhou et al. 2024, arXiv:2404.04057", "sid.py", "sid", "none"),
    "Jensen-Shannon": ("f-distill (JS)", "Xu et al. 2025, arXiv:2502.15681", "fdistill.py",
                       "fdistill", "yes"),
    "consistency": ("Consistency", "Song et al. 2023, arXiv:2303.01469", CM, "consistency", "yes"),
    "ECT": ("ECT", "Geng et al. 2024, arXiv:2406.14548", CM, "ect", "yes"),
    "progressive, 1 step": ("Progressive", "Salimans & Ho 2022, arXiv:2202.00512",
                            "progressive.py", "progressive", "yes"),
}  # fmt: skip
# The recipes of the shapes: the method, and what its adapters learn from beside the teacher.
SHAPES = {
    "dmd2-lora": ("DMD2", "captions"),
    "dmd2-lora-1step": ("DMD2, one step only", "captions"),
    "sid-lora": ("SiD", "captions"),
    "fdistill-lora": ("f-distill (JS)", "drawings"),
    "consistency-lora": ("Consistency", "drawings"),
}


def summary(name: str) -> dict[str, Any] | None:
    """A run's summary, if it has been measured."""
    path = ROOT / "docs" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def row(name: str, found: dict[str, Any], base: float | None) -> str:
    """A row; without a base, which must come from the same run, there is no speed to state."""
    spread = f" ± {found['spread']['fd']:.3f}" if found["seeds"] > 1 else ""
    shares = " | ".join(f"{found[k]:.3f}" for k in ("precision", "recall", "coverage"))
    speed = found["images_per_s"]
    timing = f"{speed:,.0f} | {speed / base:.0f}×" if base else " | "
    return f"| {name} | {found['fd']:.3f}{spread} | {shares} | {timing} |"


def readme() -> str:
    """The quickstart's table, and what four untrained steps come to under it."""
    quick = summary("dmd2")
    assert quick is not None
    metrics = quick["metrics"]
    teacher = metrics["teacher"]
    base = teacher["images_per_s"]
    lines = [
        "| | Fréchet distance | precision | recall | coverage | images/s | speed-up |",
        "|---|---|---|---|---|---|---|",
        row(f"teacher, {teacher['steps']}-step Heun", teacher, base),
        row("teacher, 1 step", metrics["teacher_few"]["1"], base),
    ]
    for steps, found in metrics["student"].items():
        lines.append(row(f"student, {steps} {plural(int(steps), 'step')}", found, base))
    lines += [searched()]
    seeds = metrics["student"]["1"]["seeds"]
    lines.append("")
    lines.append(
        f"Training: {quick['steps']} steps in {quick['wall_s']:.0f} s. "
        f"{teacher['n']:,} samples; ± is the standard deviation\nover {seeds} seeds of noise. "
        "Trainings by other seeds differ by more ([docs/benchmark.md](docs/benchmark.md)),\n"
        "and speeds vary with the machine."
    )
    return "\n".join(lines)


def searched() -> str:
    """What four steps of the teacher come to without training, at times that were searched."""
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    line = next(v for v in board if v["name"] == "dpmpp_2m, searched" and v["steps"] == 4)
    found = {k: v["mean"] for k, v in line["metrics"].items()}
    found |= {"spread": {"fd": line["metrics"]["fd"]["spread"]}, "seeds": len(line["seeds"])}
    return row("untrained: teacher, 4 steps of DPM-Solver++ at searched times", found, None)


def methods() -> str:
    """A row for each method: paper, file, recipe, data, distances by steps over training seeds."""
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    lines = [
        "| method | paper | file | recipe | data | 1 step | 2 steps | 4 steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, paper, file, recipe, data) in METHODS.items():
        values = distances(board, name)
        lines.append(f"| {title} | {paper} | `{file}` | `digits/{recipe}` | {data} | {values} |")
    return "\n".join(lines)


CHAINS = {  # rows of the digits' benchmark: what the student is trained for
    "DMD2": "its one step",
    "DMD2, 4 steps": "its four steps",
    "DMD2, 1, 2 and 4 steps": "chains of one, two and four steps",
    "DMD2, 4 steps, rivals see every place": "its four steps, with `fake_sees: places`",
}


def chains() -> str:
    """A row for each way to train DMD2's student of several steps: distances by sampling steps."""
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    lines = ["| trained for | 1 step | 2 steps | 4 steps |", "|---|---|---|---|"]
    for name, title in CHAINS.items():
        lines.append(f"| {title} | {distances(board, name)} |")
    return "\n".join(lines)


def distances(board: list[dict[str, Any]], name: str) -> str:
    """Cells of a row's distances in 1, 2 and 4 steps, with their spread over training seeds."""
    at = {line["steps"]: line["metrics"]["fd"] for line in board if line["name"] == name}
    cells = [f"{v['mean']:.3f} ± {v['spread']:.3f}" if (v := at.get(k)) else "" for k in (1, 2, 4)]
    return " | ".join(cells)


def shown(found: dict[str, Any] | None) -> str:
    """Whole captions right, then the distance, of a student or a teacher in so many steps."""
    if found is None:
        return ""
    spread = f" ± {100 * found['spread']['accuracy']:.1f}" if found["seeds"] > 1 else ""
    return f"{100 * found['accuracy']:.1f} %{spread}, {found['fd']:.1f}"


def shapes() -> str:
    """A row for each shapes recipe, and one for the teacher: captions right and distance."""
    lines = [
        "| method | recipe | learns from | 1 step | 2 steps | 4 steps | training | evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    teachers: dict[str, str] = {}
    for name, (title, data) in SHAPES.items():
        if (found := summary(f"shapes-{name}")) is None:
            continue
        student, metrics = found["metrics"]["student"], found["metrics"]
        steps = " | ".join(shown(student.get(k)) for k in ("1", "2", "4"))
        lines.append(
            f"| {title} | `shapes/{name}` | {data} | {steps} | {found['steps']} steps, "
            f"{found['wall_s']:.0f} s | {found['network_evaluations'] / 1e3:.0f} k |"
        )
        few = " | ".join(shown(metrics["teacher_few"][k]) for k in ("1", "2", "4"))
        whole = metrics["teacher"]
        row = (
            f"| teacher, {found['guidance'].split(':')[0]}; in {whole['steps']} steps "
            f"{shown(whole)} | | | {few} | | |"
        )
        teachers.setdefault(found["guidance"], row)  # the first was measured in full
    return "\n".join([*lines, *teachers.values()])


def text() -> str:
    """Teacher and students of text to image: evaluations a picture, captions right, distance."""
    lines = [
        "| | evaluations a picture | whole captions right | Fréchet distance |",
        "|---|---|---|---|",
    ]
    found = {name: summary(f"shapes-{name}") for name in ("dmd2-lora", "dmd2-lora-1step")}
    four, one = (f["metrics"] for f in found.values() if f)
    teacher = four["teacher"]
    rows = {
        f"guided teacher, {teacher['steps']} steps": (2 * teacher["steps"], teacher),
        "guided teacher, 4 steps": (8, four["teacher_few"]["4"]),
        "guided teacher, 1 step": (2, four["teacher_few"]["1"]),
        "student of `shapes/dmd2-lora`, 4 steps": (4, four["student"]["4"]),
        "student of `shapes/dmd2-lora-1step`, 1 step": (1, one["student"]["1"]),
    }
    for name, (evaluations, at) in rows.items():
        spread = at["spread"]
        right, distance = f"{100 * at['accuracy']:.1f} %", f"{at['fd']:.1f}"
        if at["seeds"] > 1:
            right += f" ± {100 * spread['accuracy']:.1f}"
            distance += f" ± {spread['fd']:.1f}"
        lines.append(f"| {name} | {evaluations} | {right} | {distance} |")
    cost = ", ".join(
        f"{f['steps']} updates in {f['wall_s']:.0f} s for `{name}`"
        for name, f in found.items()
        if f
    )
    return "\n".join([*lines, "", f"Training: {cost}, each on one thread of a busy CPU."])


def again() -> str:
    """A line for each shapes recipe that was trained from several seeds: what each came to."""
    lines: list[str] = []
    for name in SHAPES:
        runs = [f for i in ("", "-seed1", "-seed2") if (f := summary(f"shapes-{name}{i}"))]
        for k in ("1", "4"):
            right = [f["metrics"]["student"][k]["accuracy"] for f in runs
                     if k in f["metrics"]["student"]]  # fmt: skip
            if len(right) > 1:
                values = ", ".join(f"{100 * a:.1f}" for a in right)
                lines.append(f"- `shapes/{name}` at {k} {plural(int(k), 'step')}: {values} %.")
    return "\n".join(lines)


def filled(text: str, name: str, table: str) -> str:
    """The text with the table between the markers of that name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    assert pattern.search(text), name
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


PAGES: dict[str, dict[str, Callable[[], str]]] = {  # the tables of each file, by their markers
    "README.md": {"results": readme, "text": text},
    "docs/methods.md": {"results": methods, "chains": chains, "shapes": shapes, "seeds": again},
    "docs/benchmark.md": {
        "gaussians": partial(students, "gaussians"),
        "digits": partial(students, "digits"),
        "digits-untrained": partial(untrained, "digits"),
        "shapes": partial(students, "shapes", right),
        "shapes-untrained": partial(untrained, "shapes", right),
    },
}


def main() -> int:
    stale = 0
    for name, tables in PAGES.items():
        path = ROOT / name
        text = path.read_text()
        for marker, table in tables.items():
            text = filled(text, marker, table())
        if text != path.read_text():
            stale += 1
            if "--check" not in sys.argv:
                path.write_text(text)
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
