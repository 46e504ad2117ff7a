"""Write the measured tables of README and docs from the run summaries in docs/results.

    python benchmarks/tables.py [--check]

A figure in those tables is one that a run left in its summary.json; `--check` only says whether the
files are up to date, which a test asks.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
METHODS = {
    "dmd2": ("DMD2", "Yin et al. 2024, arXiv:2405.14867", "dmd2.py", "critic only"),
    "dmd2-long": ("DMD2, one step only, longer", "the same", "dmd2.py", "critic only"),
    "sid": ("SiD", "Zhou et al. 2024, arXiv:2404.04057", "sid.py", "none"),
    "fdistill": ("f-distill (JS)", "Xu et al. 2025, arXiv:2502.15681", "fdistill.py", "yes"),
    "consistency": ("Consistency", "Song et al. 2023, arXiv:2303.01469", "consistency.py", "yes"),
    "ect": ("ECT", "Geng et al. 2024, arXiv:2406.14548", "consistency.py", "yes"),
    "progressive": ("Progressive", "Salimans & Ho 2022, arXiv:2202.00512", "progressive.py", "yes"),
}


def summary(name: str) -> dict[str, Any] | None:
    """A run's summary, if it has been measured."""
    path = ROOT / "docs" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def row(name: str, found: dict[str, Any], base: float | None) -> str:
    """A row; without a base, which must come from the same run, there is no speed to compare."""
    spread = f" ± {found['spread']['fd']:.3f}" if found["seeds"] > 1 else ""
    shares = " | ".join(f"{found[k]:.3f}" for k in ("precision", "recall", "coverage"))
    speed = found["images_per_s"]
    pace = f"{speed:,.0f} | {speed / base:.0f}×" if base else "as above | as above"
    return f"| {name} | {found['fd']:.3f}{spread} | {shares} | {pace} |"


def readme() -> str:
    """The quickstart's table, and the longer run's row under it."""
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
        lines.append(row(f"student, {steps} step{'s' * (steps != '1')}", found, base))
    if long := summary("dmd2-long"):
        found = long["metrics"]["student"]["1"]
        lines.append(row("student of `digits/dmd2-long`, 1 step", found, None))
    seeds = metrics["student"]["1"]["seeds"]
    longer = f"; the longer recipe, {long['steps']} in {long['wall_s']:.0f} s" if long else ""
    lines.append("")
    lines.append(
        f"Training: {quick['steps']} steps in {quick['wall_s']:.0f} s{longer}. "
        f"{teacher['n']} samples; ± is the spread over {seeds} seeds."
    )
    return "\n".join(lines)


def methods() -> str:
    """A row for each method: paper, file, recipe, data, distance in one step, cost."""
    lines = [
        "| method | paper | file | recipe | data | one-step distance | evaluations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (title, paper, file, data) in METHODS.items():
        found = summary(name)
        value, cost = "not measured", ""
        if found:
            one = found["metrics"]["student"]["1"]
            value = f"{one['fd']:.3f} ± {one['spread']['fd']:.3f}"
            cost = f"{found['network_evaluations'] / 1e6:.2f} M"
        lines.append(
            f"| {title} | {paper} | `{file}` | `digits/{name}` | {data} | {value} | {cost} |"
        )
    return "\n".join(lines)


def filled(path: Path, table: str) -> str:
    """The file's text with the table between its markers."""
    text = path.read_text()
    pattern = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)
    assert pattern.search(text), path
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


def main() -> int:
    stale = 0
    for path, table in ((ROOT / "README.md", readme()), (ROOT / "docs/methods.md", methods())):
        text = filled(path, table)
        if text != path.read_text():
            stale += 1
            if "--check" not in sys.argv:
                path.write_text(text)
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
