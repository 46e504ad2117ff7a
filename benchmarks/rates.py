"""The measured rates that the package needs, from the results of `gpu.py` in docs/results/gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "gpu"
KEPT = ("name", "family", "adapter", "precision")
EMPTY = "no card is measured yet: benchmarks/gpu.py writes docs/results/gpu"


def row(tree: dict[str, Any], matrix: dict[str, float]) -> dict[str, Any] | None:
    """A row's share of the card's rate; None of one that was not measured.

    Neither is one that "shared" the machine with other programs.

    The FLOPs are those of `distill plan`, which divides them by this share, or else the script's
    own.
    """
    share, kind = tree.get("share"), "fp32" if tree.get("precision") == "fp32" else "bf16"
    if tree.get("plan_tflop") and tree.get("step_ms") and kind in matrix:
        share = tree["plan_tflop"] / (tree["step_ms"] / 1000) / matrix[kind]
    if not share or tree.get("shared"):
        return None
    return {**{k: tree[k] for k in KEPT}, "share": round(share, 4)}


def rates(folder: Path = RESULTS) -> str:
    """The text of distill/rates.json: every card with its matrix rates and its rows' shares."""
    cards = []
    for path in sorted(folder.glob("*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = [r for line in tree["rows"] if (r := row(line, tree["matrix_tflops"]))]
        cards.append({**{k: tree[k] for k in ("device", "torch", "date", "matrix_tflops")},
                      "rows": rows})  # fmt: skip
    return json.dumps({**({} if cards else {"note": EMPTY}), "cards": cards}, indent=1) + "\n"
