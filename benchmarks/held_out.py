"""Measure a benchmark's students in features that no row's loss reads.

    python benchmarks/held_out.py bench/digits docs/results/bench-digits runs/bench-digits [...]

The second argument is the folder to write held-out.json, .md and .png and variety.png to; the
others are folders of the benchmark. Each finished run's exported student is sampled with one seed
of noise, and figures are means over the training seeds that are there. With --kept they are those
that the runs measured themselves, where these have them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from distill.benchmark.spec import Bench, BenchmarkRun
from distill.console import print_line
from distill.sampling.student_sampler import student_samples
from eval.protocols.measure import protocol
from students.export.folder import load_student
from teachers.errors import UserError

FIGURES = ("fd", "fd_second", "precision", "recall", "coverage", "accuracy", "variety")
HEADS = ("FD", "FD, 2nd", "precision", "recall", "coverage", "accuracy", "variety")


def finished(bench: Bench, folders: list[Path]) -> Iterator[tuple[str, int, Path]]:
    """Row, seed and folder of every run that has a student; of equal ones, the first folder's."""
    for row in bench.rows:
        for seed in bench.seeds:
            runs = [BenchmarkRun(bench, row, seed, folder).folder for folder in folders]
            run = next((v for v in runs if (v / "summary.json").is_file()), None)
            if run is not None:
                yield row.name, seed, run


def kept(run: Path) -> dict[int, dict[str, float]] | None:
    """The figures that a run measured by step count; None where it lacks some."""
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"]["student"]
    if not all(set(FIGURES) <= figures.keys() for figures in found.values()):
        return None
    return {int(k): {name: v[name] for name in FIGURES} for k, v in found.items()}


def measured(run: Path, name: str) -> dict[int, dict[str, float]]:
    """The figures of a run's student by step count, with noise of seed 0."""
    generator, teacher = load_student(run / "student")
    measure, found = protocol(name), {}
    for count in generator.counts:
        student = generator.at(count)
        found[count] = measure.measure_seed(
            lambda prompts, seed, student=student: student_samples(student, teacher, prompts, seed),
            0,
        )
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """The figures as Markdown, by the second distance at the fewest steps."""
    first = {v["row"]: v["fd_second"] for v in reversed(lines)}
    ordered = sorted(lines, key=lambda v: (first[v["row"]], v["row"], v["steps"]))
    rows = ["|  | steps | seeds | " + " | ".join(HEADS) + " |", "| --- " * (len(HEADS) + 3) + "|"]
    for v in ordered:
        cells = [v["row"], str(v["steps"]), str(len(v["seeds"])), *(f"{v[k]:.3f}" for k in FIGURES)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def plot(lines: list[dict[str, Any]], out: Path) -> None:
    """The two distances against each other, of each row at its fewest steps."""
    import matplotlib.pyplot as plt

    first = list({v["row"]: v for v in reversed(lines)}.values())
    figure, ax = plt.subplots(figsize=(7, 5), dpi=150, layout="constrained")
    ax.scatter([v["fd"] for v in first], [v["fd_second"] for v in first], s=14, color="#0072B2")
    ax.set(xscale="log", yscale="log", xlabel="Fréchet distance of the usual features")
    ax.set_title("Fréchet distance of features that no loss reads", loc="left", fontsize=10)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ends = {min(first, key=lambda v: v[k])["row"] for k in ("fd", "fd_second")}
    ends |= {v["row"] for v in sorted(first, key=lambda v: v["fd"])[-4:]}
    for v in (v for v in first if v["row"] in ends):
        ax.annotate(v["row"], (v["fd"], v["fd_second"]), fontsize=8, xytext=(-4, 6),
                    textcoords="offset points", ha="right")  # fmt: skip
    figure.savefig(out)


def plot_variety(lines: list[dict[str, Any]], out: Path) -> None:
    """Variety within a prompt against the share of prompts that are right, at the fewest steps.

    A student that has lost modes is far to the left; one of noise and wrong images is low.
    """
    import matplotlib.pyplot as plt

    first = list({v["row"]: v for v in reversed(lines)}.values())
    figure, ax = plt.subplots(figsize=(7, 5), dpi=150, layout="constrained")
    ax.scatter([v["variety"] for v in first], [v["accuracy"] for v in first], s=14, color="#0072B2")
    ax.axvline(1, color="0.6", linewidth=0.8)
    ax.set(xlabel="variety within a prompt, as a share of real images'")
    ax.set_title("Share of prompts that the image shows", loc="left", fontsize=10)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    by = sorted(first, key=lambda v: v["variety"])
    ends = [*by[:3], by[-1], min(first, key=lambda v: v["accuracy"])]
    for i, v in enumerate({v["row"]: v for v in ends}.values()):
        right = v["variety"] > by[len(by) // 2]["variety"]
        ax.annotate(v["row"], (v["variety"], v["accuracy"]), fontsize=8,
                    xytext=(-5 if right else 5, 6 if i % 2 else -12), textcoords="offset points",
                    ha="right" if right else "left")  # fmt: skip
    figure.savefig(out)


def main(name: str, out: Path, folders: list[Path], own: bool = False) -> None:
    try:
        bench = Bench.load(name)
    except UserError as error:
        raise SystemExit(str(error)) from None
    measure = bench.reference().eval.protocol
    if measure is None:
        raise SystemExit(f"{name}: it has no protocol")
    out.mkdir(parents=True, exist_ok=True)  # before hours of work
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    seeds: dict[str, list[int]] = {}
    for row, seed, run in finished(bench, folders):
        figures_of_run = (kept(run) if own else None) or measured(run, measure)
        for count, figures in figures_of_run.items():
            runs.setdefault((row, count), []).append(figures)
        seeds.setdefault(row, []).append(seed)
        print_line(run.name)
    if not runs:  # what `out` holds stays
        where = ", ".join(map(str, folders))
        raise SystemExit(f"no finished run of {name} in {where}; name folders of the benchmark")
    lines = [
        {"row": row, "steps": count, "seeds": seeds[row]}
        | {k: mean(v[k] for v in found) for k in FIGURES}
        for (row, count), found in runs.items()
    ]
    (out / "held-out.json").write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
    (out / "held-out.md").write_text(table(lines))
    plot(lines, out / "held-out.png")
    plot_variety(lines, out / "variety.png")
    order: Any = spearmanr([v["fd"] for v in lines], [v["fd_second"] for v in lines])
    print_line(f"{len(lines)} lines; rank correlation of the two distances: {order.statistic:.3f}")


if __name__ == "__main__":
    words = [v for v in sys.argv[1:] if v != "--kept"]
    if len(words) < 3:
        raise SystemExit(__doc__)
    main(words[0], Path(words[1]), [Path(v) for v in words[2:]], "--kept" in sys.argv)
