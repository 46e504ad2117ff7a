"""Measure training steps on this machine's GPU against what their bare networks cost.

    python benchmarks/gpu.py [--cpu] [--json FILE] [--only NAME,…] [--steps N] [--budget SECONDS]
                             [--set KEY=VALUE]…

Networks have random weights and published shapes, so nothing is downloaded. Each row is a shipped
recipe, played by the engine; a line is printed as soon as the row is measured, and the JSON is
written after each. The default file is docs/results/gpu/DEVICE.json; there is none with `--only` or
`--set`, as it holds the figures of all recipes as they are shipped. docs/performance.md explains
the columns. `--only` also takes `experiments`, which times single pieces, and `checks`. `--cpu`
runs narrow networks and checks the ratios that a CPU can show.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

if "--cpu" in sys.argv:  # before torch looks
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gpu_parts import checks, experiments
from gpu_parts.bare import bare_figures, bound_of, compiled_names, loss_distances, planned
from gpu_parts.engine import GB, Clock, Watch, compiled, engine_figures, engine_of, release
from gpu_parts.rows import ROWS, Row

from distill.attempts import one_line
from distill.files import write
from distill.profiling import device_name
from teachers.errors import UserError

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "gpu"
EXTRAS = ("experiments", "checks")


class Report:
    """The results so far, written to the file after each change."""

    def __init__(self, path: Path | None, device: torch.device, small: bool) -> None:
        self.path = path
        memory = torch.cuda.get_device_properties(device).total_memory / GB if not small else None
        self.tree: dict[str, Any] = {
            "device": device_name(device) or "cpu",
            "memory_gb": memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "small": small,
            "rows": [],
            "not_run": [],
            "experiments": {},
            "checks": {},
        }

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, json.dumps(rounded(self.tree), indent=2) + "\n")


def rounded(value: Any) -> Any:
    """The tree with its numbers to five digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def rates(clock: Clock, small: bool) -> dict[str, Any]:
    """The measured matrix rates in TFLOP/s, on random numbers, and the copy bandwidth in GB/s."""
    n, device = 512 if small else 8192, clock.device
    matrix = {}
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        matrix[name] = 2 * n**3 / clock.time(lambda a=a, b=b: a @ b, 10) / 1e9
    source = torch.empty(2**24 if small else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gbs = 2 * len(source) / clock.time(lambda: target.copy_(source), 10) / 1e6
    return {"matrix_tflops": matrix, "copy_gbs": gbs}


# ---- a row


def about(row: Row, recipe: Any, small: bool) -> dict[str, Any]:
    """What a row is, before it is measured."""
    train, adapters, known = recipe.train, recipe.adapters, row.of(small)
    return {
        "name": row.name,
        "family": row.family,
        "objective": recipe.objective["name"],
        "adapter": adapters.kind if adapters else "full",
        "rank": adapters.rank if adapters else None,
        "precision": train.precision,
        "teacher_precision": recipe.teacher.precision or "fp32",
        "batch": train.batch,
        "accumulate": train.accumulate,
        "checkpointing": train.checkpointing,
        "shape": list(known.shape),
        "resolution": known.shape[-1] * known.factor,
        "cut": dict(row.depth) if row.depth and not small else {},
    }


def stage(result: dict[str, Any], key: str, run: Callable[[], dict[str, Any]]) -> None:
    """Add what `run` returns to the result; a failure is its one-line error under `key`."""
    try:
        result.update(run())
    except Exception as error:
        result[key] = one_line(error) or type(error).__name__
        error.__traceback__ = None  # its frames hold tensors
    release()


def measure(
    row: Row, options: argparse.Namespace, report: Report, clock: Clock, plan: Future[Any] | None
) -> None:
    """Measure one row into the report, a stage at a time; a stage that fails costs no other."""
    start, small, device = time.perf_counter(), options.cpu, clock.device
    recipe = row.settings(small, options.set)
    result = about(row, recipe, small)
    report.tree["rows"].append(result)
    names: list[str] = []

    def engine() -> dict[str, Any]:
        if not small:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        made = engine_of(row, recipe, small, Path(options.folder), device)
        clock.wait()
        built = {
            "build_s": time.perf_counter() - began,
            "build_gb": None if small else torch.cuda.max_memory_allocated() / GB,
            "parameters": sum(p.numel() for p in made.players["student"].params),
        }
        built |= compiled(made, recipe)
        names.extend(compiled_names(made))
        figures = engine_figures(Watch(made, clock), options.steps)
        figures["compile_s"] += built["chains_s"]
        return {**built, **figures}

    stage(result, "error", engine)
    report.save()
    if "error" not in result:
        stage(result, "bare_error", lambda: bare_figures(row, recipe, small, clock, names))
    run = (lambda: plan.result()) if plan else lambda: planned(row, recipe, small)
    stage(result, "plan_error", run)
    stage(result, "ratio_error", lambda: ratios(result, report.tree))
    result["seconds"] = time.perf_counter() - start
    report.save()
    say(line(result))


def compare_losses(row: Row, options: argparse.Namespace, report: Report, clock: Clock) -> None:
    """Add the distances of a row's losses in 16 bits from those in float32 to its errors."""
    recipe, out = row.settings(options.cpu, options.set), Path(options.folder)
    found = next((r for r in report.tree["rows"] if r["name"] == row.name), None)
    if found is None or recipe.train.precision == "fp32":
        return
    losses = lambda: loss_distances(row, recipe, options.cpu, out, clock.device)  # noqa: E731
    stage(found, "losses_error", lambda: {"losses": losses()})
    found.setdefault("errors", {}).update(found.pop("losses", {}))
    report.save()


def ratios(result: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """The bound, FLOPs and the shares, of what the stages measured."""
    made: dict[str, Any] = {}
    if "step_ms" not in result:
        return made
    flops = result.get("flops", {})
    if flops:
        work = sum(flops[k] * n for k, n in result["samples"].items())
        made["tflop"] = work / 1e12
        made["tflops"] = work / result["step_ms"] / 1e9
        kind = "fp32" if result["precision"] == "fp32" else "bf16"
        made["share"] = made["tflops"] / tree["matrix_tflops"][kind]
    if "bare_ms" in result:
        critic = flops.get("critic forward", 0) / flops["forward"] if flops else 1.0
        made["bound_ms"] = bound_of(result, critic)
        made["ratio"] = result["step_ms"] / made["bound_ms"]
    return made


def faults(result: dict[str, Any]) -> list[str]:
    """What a row shows to be broken, as error lines."""
    name, found = result["name"], []
    if "error" in result:
        return [f"{name}: {result['error']}"]
    if result["recompiles_late"]:
        found.append(f"{name}: {result['recompiles_late']} graphs compiled after the third step")
    if result["syncs"]:
        where = ", ".join(result["syncs_at"])
        found.append(f"{name}: the host waits {result['syncs']} times in a cycle: {where}")
    state, expected = result["state_gb"], result.get("plan_state_gb")
    if expected is not None and abs(state - expected) > 0.01 * expected:
        found.append(f"{name}: {state:.5g} GB of weights and moments; planned {expected:.5g}")
    return found


def line(result: dict[str, Any]) -> str:
    """A row as one line of text."""
    if "error" in result:
        return f"{result['name']:20} {result['seconds']:4.0f} s  failed: {result['error']}"
    parts = [f"{result['name']:20} {result['seconds']:4.0f} s  {result['step_ms']:.1f} ms a step"]
    for name, ms in result["turns_ms"].items():
        parts.append(f"{name} {ms:.1f}")
    shown = {"bound_ms": "bound {:.1f}", "ratio": "ratio {:.2f}", "peak_gb": "peak {:.1f} GB",
             "build_gb": "build {:.1f}", "plan_gb": "plan {:.1f}", "syncs": "syncs {}",
             "tflops": "{:.3g} TFLOP/s", "share": "share {:.3f}",
             "compile_s": "compile {:.0f} s", "recompiles_late": "late recompiles {}",
             "graph_breaks": "breaks {}", "limit_hits": "limit hits {}",
             "data_share": "data {:.3f}"}  # fmt: skip
    parts += [text.format(v) for k, text in shown.items() if (v := result.get(k)) is not None]
    parts += [f"{k}: {result[k]}" for k in result if k.endswith("_error")]
    return ", ".join(parts)


# ---- the command


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--cpu", action="store_true", help="narrow networks, on the CPU")
    parser.add_argument(
        "--json",
        type=Path,
        help="by default docs/results/gpu/DEVICE.json, if all rows run as shipped",
    )
    names = ", ".join([*(row.name for row in ROWS), *EXTRAS])
    parser.add_argument("--only", help=f"some of {names}")
    parser.add_argument("--steps", type=int, help="timed steps, rounded up to whole cycles")
    parser.add_argument("--budget", type=float, default=300, help="seconds; rows start within it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a key of all recipes, as train.compile=blocks")  # fmt: skip
    options = parser.parse_args()
    chosen = [row.name for row in ROWS] if options.only is None else options.only.split(",")
    options.names = [name.strip() for name in chosen]
    known = {*(row.name for row in ROWS), *EXTRAS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"--only: {unknown[0]!r} is none of {names}")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here; --cpu runs narrow networks")
    check_options(options, parser)
    if options.only is None:
        options.names += ["checks"] if options.cpu else ["experiments"]
    options.steps = options.steps or (2 if options.cpu else None)
    return options


def check_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End the command, before anything is measured, where an option cannot be carried out."""
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: {options.steps} is less than 1")
    if options.json is not None:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=options.json.parent):
                pass
        except OSError as error:
            parser.error(f"--json: {options.json} cannot be written: {error.strerror}")
        if options.json.is_dir():
            parser.error(f"--json: {options.json} is a folder; give a file in it")
    for row in ROWS:
        if row.name in options.names:
            try:
                row.settings(options.cpu, options.set)
            except UserError as error:
                parser.error(f"--set: {error}")


def path_of(options: argparse.Namespace, device: torch.device) -> Path | None:
    """The JSON file.

    By default none on a CPU, whose figures are no device's, and none of some rows or changed
    recipes: the file holds the figures of all recipes as they are shipped.
    """
    if options.json is not None or options.cpu:
        return options.json
    if options.only is not None or options.set:
        say("no file is written with --only or --set; give one by --json")
        return None
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.json"


def hide_gpu() -> None:
    """Plans use fake tensors; a context on the GPU would take memory that rows measure."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def run_rows(options: argparse.Namespace, report: Report, clock: Clock, start: float) -> None:
    """Measure the rows in order; plans are made beside them, in other processes."""
    rows = [row for row in ROWS if row.name in options.names]
    pool, plans = None, {}
    if not options.cpu and rows:
        context = get_context("spawn")
        pool = ProcessPoolExecutor(3, mp_context=context, initializer=hide_gpu)
        plans = {r.name: pool.submit(planned, r, r.settings(False, options.set), False)
                 for r in rows}  # fmt: skip
    for row in rows:
        if time.perf_counter() - start > options.budget:
            report.tree["not_run"].append(row.name)
            say(f"{row.name:20} not run: --budget {options.budget:.0f} is over")
            continue
        measure(row, options, report, clock, plans.get(row.name))
    if pool is not None:
        pool.shutdown(cancel_futures=True)
    for row in rows:  # after all steps are timed, since it takes longer
        if row.compares and time.perf_counter() - start < options.budget:
            compare_losses(row, options, report, clock)


def main() -> int:
    start, options = time.perf_counter(), parsed()
    device = torch.device("cpu" if options.cpu else "cuda")
    if options.cpu:  # for Accelerate, where torch was imported before
        os.environ["ACCELERATE_USE_CPU"] = "true"
    clock = Clock(device)
    report = Report(path_of(options, device), device, options.cpu)
    report.tree |= rates(clock, options.cpu)
    release()
    matrix = ", ".join(f"{v:.3g} in {k}" for k, v in report.tree["matrix_tflops"].items())
    say(f"{report.tree['device']}, torch {torch.__version__}, matrix TFLOP/s {matrix}, "
        f"copies {report.tree['copy_gbs']:.0f} GB/s")  # fmt: skip
    broken: list[str] = []
    with TemporaryDirectory() as folder:
        options.folder = folder
        run_rows(options, report, clock, start)
        if "experiments" in options.names:
            left = lambda: options.budget - (time.perf_counter() - start)  # noqa: E731
            experiments.run(clock, options.cpu, report.tree["experiments"], report.save, say, left)
        if "checks" in options.names:
            broken = checks.run(report.tree["checks"], say)
    report.save()
    broken = [fault for row in report.tree["rows"] for fault in faults(row)] + broken
    for fault in broken:
        sys.stderr.write(f"{fault}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
