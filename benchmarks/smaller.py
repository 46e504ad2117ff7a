"""Students of other sizes side by side: figures, weights, work, and time with the decoder.

    python benchmarks/smaller.py docs/results/smaller.json "all weights=runs/full" [NAME=RUN ...]

Times are of one call of network and decoder on this machine, for one image and for 64, all of them
in turn five times over; the table gives them as shares of the first run's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.console import print_line
from distill.files import write
from students.export.folder import load_student
from students.lora import network_of

BATCHES = (1, 64)
ROUNDS = 5


def student_of(run: Path) -> dict[str, Any]:
    """What a run's student is, with the function that draws latents and the one that decodes."""
    generator, teacher = load_student(run / "student")
    network: Any = network_of(generator.denoiser)
    decoder = getattr(teacher.codec.vae, "decoder", None)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    few = str(min(generator.counts))
    return {
        "weights": sum(p.numel() for p in network.backbone.parameters()),
        "decoder": 0 if decoder is None else sum(p.numel() for p in decoder.parameters()),
        "steps": {k: figures(v) for k, v in summary["metrics"].get("student", {}).items()},
        "draw": drawing(generator.at(int(few)), teacher),
    }


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {
        k: found[k] for k in ("fd", "fd_second", "coverage", "accuracy", "variety") if k in found
    }


def drawing(generator: Any, teacher: Any) -> Any:
    """A function of a batch size that draws and decodes so many images."""

    def draw(n: int) -> None:
        prompts = ["a red circle"] * n if not teacher.codec.classes else [0] * n
        key = (id(teacher), n)
        if key not in CONDITIONS:
            CONDITIONS[key] = teacher.codec.condition(prompts), torch.randn(n, *teacher.shape)
        cond, z = CONDITIONS[key]
        with torch.no_grad():
            teacher.codec.decode(generator(z, cond))

    return draw


CONDITIONS: dict[Any, Any] = {}  # so that texts are encoded once


def main(out: Path, runs: dict[str, Path]) -> None:
    found = {name: student_of(run) for name, run in runs.items()}
    for entry in found.values():
        with FlopCounterMode(display=False) as counter:
            entry["draw"](1)
        entry["flops"] = counter.get_total_flops()
        entry["seconds"] = {n: [] for n in BATCHES}
    for _ in range(ROUNDS):
        for n in BATCHES:
            for entry in found.values():
                began = time.perf_counter()
                entry["draw"](n)
                entry["seconds"][n].append(time.perf_counter() - began)
    for name, entry in found.items():
        del entry["draw"]
        entry["seconds"] = {str(n): median(v) for n, v in entry["seconds"].items()}
        print_line(f"{name}: {entry}")
    write(out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    names = dict(argument.split("=", 1) for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {name: Path(run) for name, run in names.items()})
