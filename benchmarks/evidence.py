"""What the benches and recipes measured, for `distill auto`: from docs/results.

Each row is a recipe, with keys to change, at one number of sampling steps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from distill.benchmark.spec import Bench, Row, laid_over
from distill.config.recipe import find, override, read_yaml
from distill.config.schema import TrainSection

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
BENCHES = {  # by name: the teacher, and the figure that ranks its students
    "digits": ("digits", "fd"),
    "shapes": ("shapes", "accuracy"),
    "gaussians": ("analytic:gaussian", "fd"),
}
TRAIN = ("batch", "accumulate", "ema")  # keys of a bench that change a run's figures
DEFAULTS = {k: TrainSection.model_fields[k].default for k in TRAIN}
KEPT = ("fd", "coverage", "accuracy")
RUNS = {"dmd2": "digits/dmd2"}  # runs of single recipes; the others are shapes-NAME


def figures(metrics: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """Mean and spread of each figure."""
    return {k: [_short(v["mean"]), _short(v["spread"])] for k, v in metrics.items() if k in KEPT}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def changes(bench: Bench, row: Row, trained: int) -> dict[str, Any]:
    """The keys in which a bench's row differs from its recipe; all keys of a row without one."""
    words = [f"{k}={math.ceil(v * trained)}" for k, v in row.shares.items()]
    if row.recipe is None:
        words += [f"train.steps={trained}"]
        return override(_copy(laid_over(bench.common, row.overrides)), words)
    own, common = read_yaml(find(row.recipe))["train"], bench.common["train"]
    train = {k: v for k in TRAIN if (v := common[k]) != own.get(k, DEFAULTS[k])}
    return override(_copy({**row.overrides, **({"train": train} if train else {})}), words)


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(tree))


def bench_rows(name: str) -> list[dict[str, Any]]:
    """The students of a bench."""
    folder = RESULTS / f"bench-{name}"
    model, _ = BENCHES[name]
    bench = Bench.model_validate(read_yaml(ROOT / f"recipes/bench/{name}.yaml"))
    rows = {row.name: row for row in bench.rows}
    found = []
    for line in json.loads((folder / "leaderboard.json").read_text(encoding="utf-8")):
        row = rows.get(line["name"])
        if line["kind"] != "student" or row is None or not line["steps"]:
            continue
        trained = round(line["train_steps"])
        found.append({
            "model": model, "name": line["name"], "recipe": row.recipe,
            "changes": changes(bench, row, trained), "objective": line["objective"],
            "steps": line["steps"], "trained": trained,
            "evaluations": round(line["network_evaluations"]), "seconds": round(line["wall_s"]),
            "seeds": len(line["seeds"]), "figures": figures(line["metrics"]),
            "from": f"docs/results/bench-{name}",
        })  # fmt: skip
    return found


def run_rows(stem: str, recipe: str) -> list[dict[str, Any]]:
    """A recipe's own run at each of its counts; of several training seeds, their mean.

    The spread is the larger of that over training seeds and that over seeds of evaluation.
    """
    paths = [RESULTS / f"{stem}{end}.json" for end in ("", "-seed1", "-seed2")]
    runs = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]
    found = []
    for steps in runs[0]["metrics"]["student"]:
        rows = [run["metrics"]["student"][steps] for run in runs]
        metrics = {
            k: {"mean": mean(r[k] for r in rows),
                "spread": max(pstdev([r[k] for r in rows]), mean(r["spread"][k] for r in rows))}
            for k in KEPT
        }  # fmt: skip
        found.append({
            "model": recipe.partition("/")[0], "name": recipe, "recipe": recipe, "changes": {},
            "objective": runs[0]["objective"], "steps": int(steps), "trained": runs[0]["steps"],
            "evaluations": runs[0]["network_evaluations"],
            "seconds": round(mean(run["wall_s"] for run in runs)), "seeds": len(runs),
            "figures": figures(metrics), "from": f"docs/results/{stem}.json",
        })  # fmt: skip
    return found


def evidence() -> str:
    """The text of distill/auto/evidence.json."""
    runs = RUNS | {
        p.stem: f"shapes/{p.stem.removeprefix('shapes-')}"
        for p in sorted(RESULTS.glob("shapes-*.json"))
        if "-seed" not in p.stem
    }
    rows = [row for name in BENCHES for row in bench_rows(name)]
    rows += [row for stem, recipe in runs.items() for row in run_rows(stem, recipe)]
    ranked = json.dumps(dict(BENCHES.values()))
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{{\n "ranked_by": {ranked},\n "rows": [\n  {lines}\n ]\n}}\n'
