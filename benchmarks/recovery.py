"""How a smaller network is best taught to be its teacher again: task, output and features.

    python benchmarks/recovery.py [--steps 80] [--json docs/results/recovery.json]

The embedded text teacher without parts of its UNet learns for a few steps by each set of terms of
the objective `compress`, from the same batches. A row has E|F - F'|² to the teacher's own output,
on states that no step saw, and its mean over three seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from distill.console import print_line
from distill.files import write
from distill.objectives.base import Batch
from distill.objectives.smaller.compress import Compression
from eval import shapes
from students.architecture.change import changed
from students.architecture.score import calibration, outputs
from students.architecture.units import size_of
from students.generator import Generator
from students.schedulers import source_of
from teachers import conditions, load
from teachers.denoiser import Guided

MIDDLE: dict[str, Any] = {"mid_block_type": None}
ATTENTION: dict[str, Any] = {
    **MIDDLE, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
}  # fmt: skip
NETWORKS = {"no middle": MIDDLE, "no middle, no attention": ATTENTION}
LOSSES: dict[str, dict[str, Any]] = {
    "task": {"output": 0, "features": 0},
    "output": {"task": 0, "features": 0},
    "task, output": {"features": 0},
    "and features of blocks": {},
    "and features over their size": {"scale": "norm"},
    "and features, masked": {"scale": "masked"},
    "and features of self-attention": {"taps": ("self-attention",)},
}


def trained(config: dict[str, Any], terms: dict[str, Any], steps: int, seed: int) -> list[float]:
    """The error before and after training."""
    torch.manual_seed(seed)
    teacher = load("shapes")
    network = source_of(teacher)
    backbone = changed(network.backbone, config, {}, []).requires_grad_(True).eval()
    student = network.twin(backbone, network.schedule)
    objective = Compression(
        teacher=Guided(network, 1.0, teacher.codec.null),
        student=Generator(student, (1.0,)),
        **{"drop": 0.0, **terms},
    )
    captions = shapes.all_captions()
    pictures = teacher.codec.encode(shapes.draw(captions, seed=1).float() / 127.5 - 1)
    cond = teacher.codec.condition(captions)
    states = calibration(teacher, captions[::12], seed=7)
    target = outputs(network, states)

    @torch.no_grad()
    def error() -> float:
        apart = (outputs(student, states) - target).square().flatten(1).mean(1)
        return (network.weight(states.t) * apart).mean().item()

    errors, optimizer = [error()], torch.optim.AdamW(backbone.parameters(), 5e-4)
    torch.manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(pictures), (32,))
        batch = Batch(pictures[rows], torch.randn_like(pictures[rows]), conditions.rows(cond, rows))
        optimizer.zero_grad()
        objective.loss(batch, 0).value.backward()
        optimizer.step()
    return [*errors, error()]


def main() -> None:
    parser = argparse.ArgumentParser(description="How a smaller network is taught.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    whole, lines = size_of(source_of(load("shapes")).backbone), []
    for name, config in NETWORKS.items():
        for loss, terms in LOSSES.items():
            if config is ATTENTION and "self-attention" in loss:
                continue  # it has none
            found = [trained(config, terms, args.steps, seed) for seed in range(args.seeds)]
            before, after = found[0][0], [v[1] for v in found]
            spread = stdev(after) if len(after) > 1 else 0.0
            lines.append({"network": name, "loss": loss, "before": before, "after": mean(after),
                          "spread": spread, "steps": args.steps, "seeds": args.seeds})  # fmt: skip
            print_line(f"{name}: {loss}: {before:.4f} → {mean(after):.4f} ± {spread:.4f}")
    sizes = {
        name: size_of(changed(source_of(load("shapes")).backbone, config, {}, [])) / whole
        for name, config in NETWORKS.items()
    }
    if args.json:
        write(args.json, json.dumps({"sizes": sizes, "rows": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
