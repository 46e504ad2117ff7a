"""Markdown tables of docs/results/gpu/*.json, for docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / "docs" / "results" / "gpu"
NOTHING = "No GPU is measured yet. `python benchmarks/gpu.py` measures the one of this machine."

Cell = Callable[[dict[str, Any]], str]


def number(key: str, form: str = "{:.2f}") -> Cell:
    """A cell of one figure; empty where the row has none."""
    return lambda row: "" if row.get(key) is None else form.format(row[key])


def turns(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ms:,.0f}" for name, ms in row["turns_ms"].items())


def batch(row: dict[str, Any]) -> str:
    parts = row["accumulate"]
    return (
        str(row["batch"]) if parts == 1 else f"{row['batch']} = {parts} × {row['batch'] // parts}"
    )


def network(row: dict[str, Any]) -> str:
    cut = ", ".join(f"{k} {v}" for k, v in row.get("cut", {}).items() if isinstance(v, int))
    return f"{row['family']}, {row['resolution']} px" + (f"; {cut}" if cut else "")


TIME: dict[str, Cell] = {
    "row": lambda row: f"`{row['name']}`",
    "network": network,
    "trains": lambda row: f"{row['adapter']} {row['rank'] or ''}".strip(),
    "compile": lambda row: row["compile"],
    "batch": batch,
    "step, ms": number("step_ms", "{:,.0f}"),
    "turns, ms": turns,
    "bound, ms": number("bound_ms", "{:,.0f}"),
    "step / bound": number("ratio"),
    "TFLOP/s": number("tflops", "{:,.0f}"),
    "share": lambda row: "" if row.get("share") is None else f"{100 * row['share']:.0f} %",
    "data": lambda row: "" if row.get("data_share") is None else f"{100 * row['data_share']:.1f} %",
}
MEMORY: dict[str, Cell] = {
    "row": TIME["row"],
    "peak, GB": number("peak_gb", "{:.1f}"),
    "planned, GB": number("plan_gb", "{:.1f}"),
    "building, GB": number("build_gb", "{:.1f}"),
    "syncs": number("syncs", "{}"),
    "compile, s": number("compile_s", "{:.0f}"),
    "graphs": number("graphs", "{}"),
    "breaks": number("graph_breaks", "{}"),
    "recompiled": number("recompiles", "{}"),
    "after step 3": number("recompiles_late", "{}"),
}
ERRORS = {
    "bf16_native": "bf16, own type",
    "bf16_autocast": "bf16, autocast",
    "fp16_autocast": "fp16, autocast",
    "loss_bf16": "losses in bf16",
    "loss_fp16": "losses in fp16",
}


def table(columns: dict[str, Cell], rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines)


def error(key: str) -> Cell:
    return lambda row: "" if (v := row["errors"].get(key)) is None else f"{v:.1e}"


def errors(rows: list[dict[str, Any]]) -> str:
    columns = {"row": TIME["row"]} | {text: error(key) for key, text in ERRORS.items()}
    return table(columns, [row for row in rows if row.get("errors")])


def experiments(results: dict[str, Any]) -> list[str]:
    """A line for each figure of each experiment."""
    lines = []
    for name, figures in results.items():
        for key, value in figures.items():
            lines.append(f"- {name}, {key}: {shown(value)}")
    return lines


def shown(value: Any) -> str:
    """Figures as text; dicts in dicts in brackets."""
    if isinstance(value, dict):
        return ", ".join(
            f"{k} ({shown(v)})" if isinstance(v, dict) else f"{k} {shown(v)}"
            for k, v in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def device(result: dict[str, Any]) -> str:
    """The section of one device."""
    matrix = ", ".join(f"{v:,.0f} TFLOP/s in {k}" for k, v in result["matrix_tflops"].items())
    parts = [
        f"## {result['device']}",
        f"{result['date']}, torch {result['torch']}. A product of two 8192² matrices reaches "
        f"{matrix}; a copy\nmoves {result['copy_gbs']:,.0f} GB/s.",
    ]
    rows = [row for row in result["rows"] if "error" not in row and "step_ms" in row]
    if rows:
        parts += [table(TIME, rows), table(MEMORY, rows)]
    if any(row.get("errors") for row in rows):
        parts.append(errors(rows))
    lines = [f"- {note}" for note in result.get("notes", ())]
    lines += [
        f"- `{row['name']}` failed: {row['error']}" for row in result["rows"] if "error" in row
    ]
    lines += [f"- `{name}` was not run: the time was over." for name in result["not_run"]]
    lines += experiments(result["experiments"])
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def gpus(folder: Path = FOLDER) -> str:
    """A section for each device that was measured."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(map(device, results)) if results else NOTHING
