"""Write the tables of measurements in README and docs from the results in docs/results.

    python benchmarks/tables.py [--check]

All numbers in the tables come from summary.json of a run, from a leaderboard, or from what
`gpu.py` measured. It also writes distill/rates.json from docs/results/gpu. `--check` writes
nothing: its exit code is the number of files that are out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from boards import caption_accuracy, lines, students, untrained
from evidence import evidence
from gpu_parts.tables import gpus
from rates import rates

from eval import catalogue
from teachers.errors import plural

ROOT = Path(__file__).parent.parent
SHARES = ("precision", "recall", "coverage")  # beside the distance, in the quickstart's table
# The method, its paper, file, recipe and what it learns from, by row of the digits benchmark.
SONG = "Song et al. 2023, arXiv:2303.01469"
BOTH, DATA, PAIRS = "teacher, data", "data", "pairs"
CT_FILE, CM = "consistency_training.py", "consistency.py"
METHODS = {
    "DMD2": ("DMD2", "Yin et al. 2024, arXiv:2405.14867", "dmd2.py", "dmd2",
             "teacher; its critic, data"),
    "DMD2, 4 steps": ("DMD2, four steps", "the same", "dmd2.py", "dmd2-4step",
                      "teacher; its critic, data"),
    "SiD α = 1": ("SiD", "Zhou et al. 2024, arXiv:2404.04057", "sid.py", "sid", "teacher"),
    "SiD, 4 steps": ("SiD, four steps", "the same", "sid.py", "sid", "teacher"),
    "Jensen-Shannon": ("f-distill (JS)", "Xu et al. 2025, arXiv:2502.15681", "fdistill.py",
                       "fdistill", BOTH),
    "SiDA": ("SiDA", "Zhou et al. 2024, arXiv:2410.14919", "sida.py", "sida", BOTH),
    "SIM": ("SIM", "Luo et al. 2024, arXiv:2410.16794", "sim.py", "sim", "teacher"),
    "Uni-Instruct": ("Uni-Instruct (forward KL)", "Wang et al. 2025, arXiv:2505.20755",
                     "uni_instruct.py", "uni-instruct", BOTH),
    "Diff-Instruct": ("Diff-Instruct", "Luo et al. 2023, arXiv:2305.18455", "diff_instruct.py",
                      "diff-instruct", "teacher"),
    "Diff-Instruct, 4 steps": ("Diff-Instruct, four steps", "the same", "diff_instruct.py",
                               "diff-instruct", "teacher"),
    "DMD": ("DMD, on pairs", "Yin et al. 2023, arXiv:2311.18828", "dmd.py", "dmd", PAIRS),
    "EMD": ("EMD", "Xie et al. 2024, arXiv:2405.16852", "emd.py", "emd", "teacher"),
    "TDM, 4 steps": ("TDM", "Luo et al. 2025, arXiv:2503.06674", "tdm.py", "tdm", "teacher"),
    "LADD": ("LADD", "Sauer et al. 2024, arXiv:2403.12015", "ladd.py", "ladd", DATA),
    "LADD, 4 steps": ("LADD, four steps", "the same", "ladd.py", "ladd", DATA),
    "ADD": ("ADD", "Sauer et al. 2023, arXiv:2311.17042", "ladd.py", "ladd", BOTH),
    "SAN": ("SAN, in LADD", "Takida et al. 2023, arXiv:2301.12811", "games.py", "san", DATA),
    "GDD": ("GDD", "Zheng & Yang 2024, arXiv:2405.20750", "ladd.py", "gdd", DATA),
    "MMD": ("MMD in features", "Aiello et al. 2023, arXiv:2301.07969", "mmd.py", "mmd", DATA),
    "FD-loss": ("FD-loss", "Yang et al. 2026, arXiv:2604.28190", "fd_loss.py", "fd-loss", DATA),
    "drifting": ("Drifting in features", "Zhang et al. 2026, arXiv:2605.07327", "drift.py",
                 "drift", DATA),
    "consistency": ("Consistency", SONG, CM, "consistency", BOTH),
    "CT": ("CT", SONG, CT_FILE, "ct", DATA),
    "iCT": ("iCT", "Song & Dhariwal 2023, arXiv:2310.14189", CT_FILE, "ict", DATA),
    "iCT, immiscible noise": ("iCT, immiscible noise", "Li et al. 2024, arXiv:2406.12303",
                              "data/stream.py", "immiscible", DATA),
    "iLCT": ("iLCT's loss", "Dao et al. 2025, arXiv:2502.01441", CT_FILE, "ilct", DATA),
    "ECT": ("ECT", "Geng et al. 2024, arXiv:2406.14548", CM, "ect", DATA),
    "ECT, shared times": ("E-TSDM's shared times, in ECT", "Yang et al. 2023, arXiv:2306.11251",
                          "teachers/denoiser.py", "ect", DATA),
    "SCT": ("SCT", "Wang et al. 2024, arXiv:2410.18958", CM, "sct", DATA),
    "TCM": ("TCM", "Lee et al. 2024, arXiv:2410.14895", "tcm.py", "tcm", DATA),
    "sCM": ("sCM (sCD)", "Lu & Song 2024, arXiv:2410.11081", "scm.py", "scm", BOTH),
    "sCM, training": ("sCM (sCT)", "the same", "scm.py", "scm", DATA),
    "MeanFlow": ("MeanFlow", "Geng et al. 2025, arXiv:2505.13447", "meanflow.py", "meanflow", BOTH),
    "MeanFlow, of data": ("MeanFlow, from data", "the same", "meanflow.py", "meanflow", DATA),
    "improved MeanFlow": ("Improved MeanFlow", "Geng et al. 2025, arXiv:2512.02012", "meanflow.py",
                          "meanflow", BOTH),
    "Lagrangian": ("Lagrangian self-matching", "Boffi et al. 2024, arXiv:2406.07507",
                   "lagrangian.py", "lagrangian", "teacher"),
    "AYF": ("AYF", "Sabour et al. 2025, arXiv:2506.14603", "meanflow.py", "ayf", BOTH),
    "CTM": ("CTM, no critic", "Kim et al. 2023, arXiv:2310.02279", "ctm.py", "ctm", BOTH),
    "CTM, critic": ("CTM, with a critic", "the same", "ctm.py", "ctm", BOTH),
    "shortcut": ("Shortcut", "Frans et al. 2024, arXiv:2410.12557", "shortcut.py", "shortcut",
                 BOTH),
    "shortcut, of data": ("Shortcut, from data", "the same", "shortcut.py", "shortcut", DATA),
    "AnyFlow": ("AnyFlow's first stage", "Gu et al. 2026, arXiv:2605.13724", "anyflow.py",
                "anyflow", DATA),
    "CMT": ("CMT, alone", "Hu et al. 2025, arXiv:2509.24526", "cmt.py", "cmt", BOTH),
    "IMM": ("IMM", "Zhou et al. 2025, arXiv:2503.07565", "imm.py", "imm", DATA),
    "KD": ("KD", "Luhman & Luhman 2021, arXiv:2101.02388", "kd.py", "kd", PAIRS),
    "KD, 2 steps": ("KD, two steps", "the same", "kd.py", "kd", PAIRS),
    "KD, 2 steps, from its own": ("KD, two steps, `states: own`", "the same", "kd.py", "kd", PAIRS),
    "KD, 4 steps": ("KD, four steps", "the same", "kd.py", "kd", PAIRS),
    "ReFlow": ("ReFlow, then distilled", "Liu et al. 2022, arXiv:2209.03003", "reflow.py",
               "reflow", PAIRS),
    "ReFlow, 2 steps": ("ReFlow, two steps", "the same", "reflow.py", "reflow", PAIRS),
    "ReFlow, 4 steps": ("ReFlow, four steps", "the same", "reflow.py", "reflow", PAIRS),
    "2-RF++": ("2-RF++", "Lee et al. 2024, arXiv:2405.20320", "reflow.py", "reflow", PAIRS),
    "SlimFlow's annealing": ("SlimFlow's annealing, then distilled",
                             "Zhu et al. 2024, arXiv:2407.12718", "reflow.py", "reflow", PAIRS),
    "Simple ReFlow": ("Simple ReFlow", "Kim et al. 2024, arXiv:2410.07815", "reflow.py",
                      "simple-reflow", PAIRS),
    "guided distillation": ("Guided distillation, g = 1 of 1 to 3",
                            "Meng et al. 2022, arXiv:2210.03142", "guided.py", "guided", BOTH),
    "progressive, 1 step": ("Progressive", "Salimans & Ho 2022, arXiv:2202.00512",
                            "progressive.py", "progressive", BOTH),
    "progressive, 2 steps": ("Progressive, two steps", "the same", "progressive.py",
                             "progressive", BOTH),
    "progressive, 4 steps": ("Progressive, four steps", "the same", "progressive.py",
                             "progressive", BOTH),
}  # fmt: skip
# The latent consistency family and reflow, by row of the shapes benchmark.
LATENT: dict[str, tuple[str, str, str | None]] = {
    "LCM, all weights": ("LCM, all weights", "Luo et al. 2023, arXiv:2310.04378", "lcm"),
    "LCM-LoRA": ("LCM-LoRA", "Luo et al. 2023, arXiv:2311.05556", "lcm-lora"),
    "PCM, 4 steps": ("PCM", "Wang et al. 2024, arXiv:2405.18407", "pcm"),
    "TCD": ("TCD, γ = 0.3", "Zheng et al. 2024, arXiv:2402.19159", "tcd"),
    "RG-LCD": ("RG-LCD, latent proxy", "Li et al. 2024, arXiv:2403.11027", "rg-lcd"),
    "ReFlow": ("ReFlow", "Liu et al. 2022, arXiv:2209.03003", "reflow"),
}
# Matching, critics, rewards and features, by row of the shapes benchmark.
MATCHING: dict[str, tuple[str, str, str | None]] = {
    "SwiftBrush, one step only": ("SwiftBrush", "Nguyen & Tran 2023, arXiv:2312.05239",
                                  "swiftbrush"),
    "SiD-LSG, one step only": ("SiD-LSG, α = 1", "Zhou et al. 2024, arXiv:2406.01561", "sid-lora"),
    "Decoupled DMD": ("Decoupled DMD", "arXiv:2511.22677", "decoupled"),
    "DP-DMD": ("DP-DMD", "arXiv:2602.03139", "dp-dmd"),
    "CDM": ("CDM", "arXiv:2605.06376", "cdm"),
    "CDM without its chains": ("Decoupled DMD along the ODE", "arXiv:2511.22677", "cdm"),
    "TDM": ("TDM", "Luo et al. 2025, arXiv:2503.06674", "tdm"),
    "TDM, the fake learns states": ("TDM, as Phased DMD's fake learns", "arXiv:2510.27684", "tdm"),
    "DMD2, gradients of two steps": ("DMD2, gradients of two steps", "arXiv:2606.12575",
                                     "dmd2-lora"),
    "DMD2 with critic on the teacher": ("DMD2, `critic.reads: teacher`", "Yin et al. 2024, "
                                        "arXiv:2405.14867", "dmd2-lora"),
    "DMD2 with critic, adaptive noise": ("DMD2, Diffusion-GAN's `reach`", "Wang et al. 2022, "
                                         "arXiv:2206.02262", "dmd2-lora"),
    "DMD2, split steps": ("DMD2, Flash-DMD's `split`", "Chen et al. 2025, arXiv:2511.20549",
                          "dmd2-lora"),
    "Flash Diffusion": ("Flash Diffusion", "Chadebec et al. 2024, arXiv:2406.02347", "flash"),
    "DRaFT, 2 steps": ("DRaFT", "Clark et al. 2023, arXiv:2309.17400", "draft"),
    "DRaFT-LV, 2 steps": ("DRaFT-LV", "the same", "draft"),
    "DMD2 with a reward, one step only": ("DMD2, a balanced reward", "Clark et al. 2023, "
                                          "arXiv:2309.17400", "dmd2-lora-1step"),
    "MMD, one step only": ("MMD in features", "Aiello et al. 2023, arXiv:2301.07969", None),
}  # fmt: skip
# By shapes recipe: the method, and the data that its adapters learn from beside the teacher.
SHAPES = {
    "dmd2-lora": ("DMD2", "captions"),
    "dmd2-lora-1step": ("DMD2, one step only", "captions"),
    "sid-lora": ("SiD", "captions"),
    "fdistill-lora": ("f-distill (JS)", "drawings"),
    "consistency-lora": ("Consistency", "drawings"),
}


def summary(name: str) -> dict[str, Any] | None:
    """A run's summary; None if there is none."""
    path = ROOT / "docs" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def row(name: str, metrics: dict[str, Any], base: float | None) -> str:
    """A row of the quickstart's table.

    Args:
        base: Images per second of the teacher in the same run; None leaves the speed empty.
    """
    spread = f" ± {metrics['spread']['fd']:.3f}" if metrics["seeds"] > 1 else ""
    shares = " | ".join(catalogue.written(k, metrics[k]) for k in SHARES)
    speed = metrics["images_per_s"]
    timing = f"{speed:,.0f} | {speed / base:.0f}×" if base else " | "
    return f"| {name} | {metrics['fd']:.3f}{spread} | {shares} | {timing} |"


def readme() -> str:
    """The quickstart's table, with the teacher's four searched steps as its last row."""
    quick = summary("dmd2")
    assert quick is not None
    metrics = quick["metrics"]
    teacher = metrics["teacher"]
    base = teacher["images_per_s"]
    lines = [
        f"| | {' | '.join(map(catalogue.label, ('fd', *SHARES, 'images_per_s')))} | speed-up |",
        "|---|---|---|---|---|---|---|",
        row(f"teacher, {teacher['steps']}-step Heun", teacher, base),
        row("teacher, 1 step", metrics["teacher_few"]["1"], base),
    ]
    for steps, student in metrics["student"].items():
        lines.append(row(f"student, {steps} step{'s' * (steps != '1')}", student, base))
    lines += [searched()]
    seeds = metrics["student"]["1"]["seeds"]
    lines.append("")
    lines.append(
        f"Training: {quick['steps']} steps in {quick['wall_s']:.0f} s. "
        f"{teacher['n']:,} samples; ± is the standard deviation\nover {seeds} seeds of noise. "
        "Trainings by other seeds, or on another\nnumber of threads, which round sums "
        "otherwise, differ by more: others have given 0.160 ± 0.007 and 0.190 ± 0.020\n"
        "([docs/benchmark.md](docs/benchmark.md)). Speeds vary with the machine."
    )
    return "\n".join(lines)


def searched() -> str:
    """The row of the teacher in four steps at searched timesteps, without training."""
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    line = next(v for v in board if v["name"] == "dpmpp_2m, searched" and v["steps"] == 4)
    metrics = {k: v["mean"] for k, v in line["metrics"].items()}
    metrics |= {"spread": {"fd": line["metrics"]["fd"]["spread"]}, "seeds": len(line["seeds"])}
    return row("untrained: teacher, 4 steps of DPM-Solver++ at searched times", metrics, None)


def methods() -> str:
    """A row for each method: paper, file, recipe, data, and distances by step count."""
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    lines = [
        "| method | paper | file | recipe | learns from | 1 step | 2 steps | 4 steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, paper, file, recipe, data) in METHODS.items():
        values = distances(board, name)
        lines.append(f"| {title} | {paper} | `{file}` | `digits/{recipe}` | {data} | {values} |")
    return "\n".join(lines)


CHAINS = {  # by row of the digits benchmark: the step counts that the student is trained for
    "DMD2": "its one step",
    "DMD2, 4 steps": "its four steps",
    "DMD2, 1, 2 and 4 steps": "chains of one, two and four steps",
    "DMD2, 4 steps, rivals see every place": "its four steps, with `fake_sees: places`",
}


def chains() -> str:
    """A row for each way to train DMD2's student of several steps: distances by step count."""
    board = json.loads((ROOT / "docs/results/bench-digits/leaderboard.json").read_text())
    lines = ["| trained for | 1 step | 2 steps | 4 steps |", "|---|---|---|---|"]
    for name, title in CHAINS.items():
        lines.append(f"| {title} | {distances(board, name)} |")
    return "\n".join(lines)


def latent(methods: dict[str, tuple[str, str, str | None]]) -> str:
    """A row for each of the methods on shapes: captions right and distance by step count."""
    board = {(line.name, line.steps): line for line in lines("shapes")}
    rows = ["| method | paper | recipe | 1 step | 2 steps | 4 steps |", "|---|---|---|---|---|---|"]
    for name, (title, paper, recipe) in methods.items():
        at = [board.get((name, k)) for k in (1, 2, 4)]
        cells = [caption_accuracy(line) if line else "" for line in at]
        shown = f"`shapes/{recipe}`" if recipe else "`bench/shapes`"
        rows.append(f"| {title} | {paper} | {shown} | {' | '.join(cells)} |")
    return "\n".join(rows)


def distances(board: list[dict[str, Any]], name: str) -> str:
    """A row's distances in 1, 2 and 4 steps, with the spread where there are several seeds."""
    at = {line["steps"]: line for line in board if line["name"] == name}
    cells = []
    for k in (1, 2, 4):
        figure = at[k]["metrics"]["fd"] if k in at else None
        spread = f" ± {figure['spread']:.3f}" if figure and len(at[k]["seeds"]) > 1 else ""
        cells.append(f"{figure['mean']:.3f}{spread}" if figure else "")
    return " | ".join(cells)


def cell(metrics: dict[str, Any] | None) -> str:
    """The share of captions wholly right, and the distance; empty for None."""
    if metrics is None:
        return ""
    spread = f" ± {100 * metrics['spread']['accuracy']:.1f}" if metrics["seeds"] > 1 else ""
    return f"{100 * metrics['accuracy']:.1f} %{spread}, {metrics['fd']:.1f}"


def shapes() -> str:
    """A row for each shapes recipe, then one for the teacher: captions right and distance."""
    lines = [
        "| method | recipe | learns from | 1 step | 2 steps | 4 steps | training | evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    teachers: dict[str, str] = {}
    for name, (title, data) in SHAPES.items():
        if (run := summary(f"shapes-{name}")) is None:
            continue
        student, metrics = run["metrics"]["student"], run["metrics"]
        steps = " | ".join(cell(student.get(k)) for k in ("1", "2", "4"))
        lines.append(
            f"| {title} | `shapes/{name}` | {data} | {steps} | {run['steps']} steps, "
            f"{run['wall_s']:.0f} s | {run['network_evaluations'] / 1e3:.0f} k |"
        )
        few = " | ".join(cell(metrics["teacher_few"][k]) for k in ("1", "2", "4"))
        full = metrics["teacher"]
        row = (
            f"| teacher, {run['guidance'].split(':')[0]}; in {full['steps']} steps "
            f"{cell(full)} | | | {few} | | |"
        )
        teachers.setdefault(run["guidance"], row)  # the first has all metrics
    return "\n".join([*lines, *teachers.values()])


def text() -> str:
    """Text-to-image teacher and students: evaluations per image, captions right, distance."""
    lines = [
        f"| | evaluations a picture | whole captions right | {catalogue.label('fd')} |",
        "|---|---|---|---|",
    ]
    runs = {name: summary(f"shapes-{name}") for name in ("dmd2-lora", "dmd2-lora-1step")}
    four, one = (f["metrics"] for f in runs.values() if f)
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
        f"{f['steps']} updates in {f['wall_s']:.0f} s for `{name}`" for name, f in runs.items() if f
    )
    return "\n".join([*lines, "", f"Training: {cost}, each on one thread of a busy CPU."])


def seeds() -> str:
    """A line for each shapes recipe trained with several seeds: the accuracy of each."""
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


def style() -> str:
    """A row for the teacher with the user's LoRA, its students, and the files in stock diffusers.

    The columns: pictures with the style where the caption has its word, that as a share of the
    teacher's, and captions right but for the colour; then for captions that training never had, and
    captions without the word.
    """
    rows = json.loads((ROOT / "docs/results/orange.json").read_text())
    most = rows[0]["own orange"][0]

    def share(value: float | list[float]) -> str:
        mean, *error = value if isinstance(value, list) else [value]
        return f"{100 * mean:.1f}" + "".join(f" ± {100 * e:.1f}" for e in error) + " %"

    lines = [
        "| | orange, of the 40 | of the teacher's | right, of the 40 | orange, 20 others | "
        "right, 20 others | right, without the word |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["of"]
        if "steps" in row:
            name += f", {row['steps']} {plural(row['steps'], 'step')}, training seed {row['seed']}"
        has_style = row["own orange"][0] > 0.1
        cells = [
            share(row["own orange"]),
            f"{100 * row['own orange'][0] / most:.0f} %" if has_style else "",
            share(row["own right"]),
            share(row["new orange"]),
            share(row["new right"]),
            share(row["without"]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures() -> str:
    """A row for each figure of the catalogue."""
    lines = ["| key | label | better | unit | what | paper |", "|---|---|---|---|---|---|"]
    for key, info in catalogue.CATALOGUE.items():
        name = "" if info.role == "detail" else f"**{info.label}**"
        paper = f"arXiv:{info.paper}" if info.paper else ""
        cells = (f"`{key}`", name, info.better, info.unit, info.summary, paper)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recovery() -> str:
    """How far a smaller network is from its teacher, by what it learned."""
    found = json.loads((ROOT / "docs/results/recovery.json").read_text())
    names = list(found["sizes"])
    heads = [f"{name} ({share:.0%} of the weights)" for name, share in found["sizes"].items()]
    lines = ["| terms | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    before = {r["network"]: f"{r['before']:.4f}" for r in found["rows"]}
    lines.append("| before | " + " | ".join(before[name] for name in names) + " |")
    for loss in dict.fromkeys(r["loss"] for r in found["rows"]):
        after = {r["network"]: f"{r['after']:.4f} ± {r['spread']:.4f}"
                 for r in found["rows"] if r["loss"] == loss}  # fmt: skip
        lines.append(f"| {loss} | " + " | ".join(after.get(name, "") for name in names) + " |")
    return "\n".join(lines)


def sizes() -> str:
    """Students of other sizes: figures, and what they weigh and take, as shares of the first."""
    found = json.loads((ROOT / "docs/results/smaller.json").read_text())
    first = next(iter(found.values()))
    lines = ["| student | weights | decoder's | work | time of 1 | of 64 | right | FD | variety |"]
    lines.append("| --- " * 9 + "|")
    for name, v in found.items():
        steps = min(v["steps"], key=int)
        figures = v["steps"][steps]
        times = [f"{v['seconds'][n] / first['seconds'][n]:.2f}" for n in ("1", "64")]
        cells = [
            name, f"{v['weights']:,}", f"{v['decoder']:,}", f"{v['flops'] / 1e6:.0f} MFLOP", *times,
            f"{100 * figures['accuracy']:.1f} %",
            f"{figures['fd']:.2f}", f"{figures['variety']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(text: str, name: str, table: str) -> str:
    """The text with the table between the markers of that name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    assert pattern.search(text), name
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


PAGES: dict[str, dict[str, Callable[[], str]]] = {  # by file and marker, the function of a table
    "README.md": {"results": readme, "text": text},
    "docs/figures.md": {"figures": figures},
    "docs/methods.md": {
        "results": methods,
        "chains": chains,
        "shapes": shapes,
        "seeds": seeds,
        "latent": partial(latent, LATENT),
        "matching": partial(latent, MATCHING),
    },
    "docs/benchmark.md": {
        "gaussians": partial(students, "gaussians"),
        "digits": partial(students, "digits"),
        "digits-untrained": partial(untrained, "digits"),
        "shapes": partial(students, "shapes", caption_accuracy),
        "shapes-untrained": partial(untrained, "shapes", caption_accuracy),
    },
    "docs/performance.md": {"gpus": gpus},
    "docs/smaller.md": {"recovery": recovery, "sizes": sizes},
    "docs/sharing.md": {"style": style},
}


def written() -> dict[str, str]:
    """The text of every file, by name."""
    texts = {"distill/rates.json": rates(), "distill/auto/evidence.json": evidence()}
    for name, tables in PAGES.items():
        texts[name] = (ROOT / name).read_text()
        for marker, table in tables.items():
            texts[name] = insert(texts[name], marker, table())
    return texts


def main() -> int:
    stale = 0
    for name, text in written().items():
        path = ROOT / name
        if not path.exists() or text != path.read_text():
            stale += 1
            if "--check" not in sys.argv:
                path.write_text(text)
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
