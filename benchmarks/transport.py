"""How near the students of each objective come to the teacher's own map, where it is known.

    python benchmarks/transport.py [ROW …] [--steps 4000] [--json FILE] [--markdown FILE]

In one dimension the probability-flow ODE maps each quantile of the noise to the same quantile of
the data, whatever the process. The data are two modes at ±1 of standard deviation 0.2, so 1.02 in
all, and the teacher is their exact denoiser. Each objective trains a small network by the same
number of updates; at first it is a denoiser, trained on the teacher's x̂. The table has the mean
distance of its samples to that map, over evenly spaced quantiles, and that of the teacher's DDIM in
as many steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.config.objective_schema import network_types
from distill.config.objectives import OBJECTIVES
from distill.objectives.base import Auxiliary, Batch
from distill.objectives.noise_levels import LogNormal
from students.generator import Generator
from teachers.analytic import Mixture
from teachers.denoiser import Cond, Denoiser, edm
from teachers.process import Karras, Process, Tabulated
from teachers.solver import ddim
from teachers.teacher import Pixels, Teacher

MEANS, STD = (-1.0, 1.0), 0.2
SIGMA_MIN, BATCH, QUANTILES = 0.002, 512, 999
MIDDLE = 0.8  # σ of the second step
HALF = 499 / 999  # its time on DDPM's indices, where it is a level of every grid


@dataclass(frozen=True)
class Row:
    """An objective with its fields; `renoise` and `counts` as a recipe's student has them.

    process: EDM's, or that of Stable Diffusion, on whose indices some methods are defined.
    """

    objective: str
    fields: dict[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (1, 2)
    renoise: bool = True
    process: Literal["edm", "ddpm"] = "edm"
    lr: float = 1e-3


FLOW = {"equal": 0.25, "power": 0.5, "times": LogNormal(1.0, 2.0), "landings": LogNormal(-3.0, 2.0)}
CT = {"curriculum": "square-root", "index": "uniform", "distance": "square", "gaps": "even"}
ROWS = {
    "CD": Row("consistency", {"pairs": "grid", "levels": 40, "target_ema": 0.95}),
    "CT": Row("ct", {**CT, "first": 2, "last": 40, "stage_steps": 2000, "target_ema": 0.9}),
    "iCT": Row("ct", {"stage_steps": 500, "last": 160, "mean": -0.5}),
    "ECT": Row("ect", {"q": 4, "stage_steps": 500}),
    "SCT": Row("ect", {"q": 4, "stage_steps": 500, "references": True}),
    "sCM": Row("scm", {"tangent_warmup": 200, "sigma_data": 1.0}, lr=3e-4),
    "TCM": Row("tcm", {"q": 4, "stage_steps": 500, "first_steps": 1000, "boundary_level": 0.5}),
    "LCM": Row("lcm", {"distance": "square"}, process="ddpm"),
    "PCM": Row("pcm", {"distance": "square", "levels": 40}, (2,), renoise=False, process="ddpm"),
    "TCD": Row("tcd", {"distance": "square"}, renoise=False, process="ddpm"),
    "progressive": Row("progressive", {"initial_steps": 16, "stage_steps": 500}, (1,)),
    "guided": Row("guided", {"initial_steps": 16, "stage_steps": 500, "first_steps": 500}, (1,)),
    "MeanFlow": Row("meanflow", FLOW, renoise=False),
    "improved MeanFlow": Row("meanflow", {**FLOW, "direction": "own"}, renoise=False),
    "AYF": Row("ayf", {k: FLOW[k] for k in ("times", "landings")}, renoise=False),
    "CTM": Row("ctm", {"denoising_weight": 0.0, "target_ema": 0.9}, renoise=False),
    "shortcut": Row("shortcut", {"bootstrap": 0.5, "target_ema": 0.9}, renoise=False),
    "Lagrangian": Row("lagrangian", {"power": 0.5}, renoise=False),
    "IMM": Row("imm", {"group": 16, "sigma_data": 1.0}, renoise=False),
    "KD": Row("kd", {}, renoise=False),
    "ReFlow": Row("reflow", {}, renoise=False),
    "ReFlow, distilled": Row("reflow", {"distil_from": 2000}, renoise=False),
}


class Net(Denoiser):
    """A small network in one dimension, that reads t and s as features of log σ/α."""

    rates: Tensor

    def __init__(self, process: Process, width: int = 128, features: int = 16) -> None:
        super().__init__()
        self.process, self.two_times = process, False  # whether it reads s, or always 0
        floor = SIGMA_MIN if isinstance(process, Karras) else 0.0
        self.coefficients = edm(1.0, floor)
        self.register_buffer("rates", 2.0 ** torch.linspace(-2, 2, features // 2))
        self.body = nn.Sequential(
            nn.Linear(1 + 2 * features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        s = s if self.two_times and s is not None else torch.zeros_like(t)
        alpha, sigma = self.process.at(t, x_t)
        c_skip, c_out = self.coefficients(alpha, sigma)
        inner = x_t / (sigma**2 + alpha**2).sqrt()
        return c_skip * x_t + c_out * self.body(torch.cat([inner, *map(self.embed, (t, s))], 1))

    def embed(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.scales(t)
        angle = (sigma / alpha).log()[:, None] * self.rates
        return torch.cat([angle.cos(), angle.sin()], 1)

    def weight(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.scales(t)
        return ((sigma**2 + alpha**2) / sigma**2).to(t.dtype)


PROCESSES: dict[str, Process] = {"edm": Karras(SIGMA_MIN), "ddpm": Tabulated.scaled_linear()}


@lru_cache
def denoiser(name: str, updates: int) -> Net:
    """A network that has learned the teacher's x̂ in so many updates, under a named process."""
    torch.manual_seed(0)
    teacher, net = modes(PROCESSES[name]), Net(PROCESSES[name])
    optimiser = torch.optim.Adam(net.parameters(), 2e-3, (0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for _ in range(updates):
        t = torch.rand(BATCH)
        x_t = net.process.noise(teacher.sample(BATCH), t, torch.randn(BATCH, 1))
        error = (net(x_t, t) - teacher(x_t, t)).square().mean(1)
        (net.weight(t) * error).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return net


def modes(process: Process = PROCESSES["edm"]) -> Mixture:
    """The teacher."""
    return Mixture(torch.tensor(MEANS)[:, None], STD, process)


@lru_cache
def pairs(name: str, count: int = 2**14) -> tuple[Tensor, Tensor]:
    """Noise, and what the ODE makes of it; (count, 1) each."""
    torch.manual_seed(1)
    z, known = torch.randn(count, 1), transport(PROCESSES[name])
    z = z.clamp(known[0][0], known[0][-1])
    place = torch.searchsorted(known[0][:, 0], z[:, 0]).clamp(1, len(known[0]) - 1)
    (low, high), (x, y) = (tuple(v[place + k] for k in (-1, 0)) for v in known)
    return z, torch.lerp(x, y, (z - low) / (high - low))


def train(row: Row, updates: int, seed: int = 0) -> Generator:
    """The student after so many updates, averaged over the last of them."""
    start = deepcopy(denoiser(row.process, updates))
    torch.manual_seed(seed)
    process = start.process
    teacher = modes(process)
    middle = process.time(torch.tensor(MIDDLE)).item() if row.process == "edm" else HALF
    times = (1.0, middle) if max(row.counts) == 2 else (1.0,)
    kind = OBJECTIVES[row.objective]
    start.two_times = kind.two_times
    floor = SIGMA_MIN if row.process == "edm" else 0.0
    student = Generator(start, times, row.renoise, floor)
    networks: dict[str, Any] = {"teacher": teacher, "student": student}
    described = Teacher(teacher, Pixels(), (1,))
    for name, auxiliary in network_types(kind, Auxiliary).items():
        networks[name] = auxiliary.for_objective(described)  # pyright: ignore
    objective = kind(**networks, **row.fields)
    players = {n: v for n, v in networks.items() if n != "teacher"}
    optimisers = {
        n: torch.optim.Adam(v.parameters(), row.lr, (0.9, 0.99)) for n, v in players.items()
    }
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, updates) for o in optimisers.values()
    ]
    average = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    for step in range(updates):
        for turn in objective.turns(step):
            batch = Batch(teacher.sample(BATCH), torch.randn(BATCH, 1))
            if kind.needs_data == "pairs":
                z, x = pairs(row.process)
                some = torch.randint(len(z), (BATCH,))
                batch = Batch(x[some], z[some])
            turn.loss(batch).value.backward()
            for name in turn.players:
                nn.utils.clip_grad_norm_(players[name].parameters(), 1.0)
                optimisers[name].step()
                optimisers[name].zero_grad()
        average.update_parameters(student)
        for schedule in schedules:
            schedule.step()
    trained = average.module
    assert isinstance(trained, Generator)
    return trained


def quantiles() -> Tensor:
    """Evenly spaced shares in (0, 1), (N,) float64."""
    return (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES


def transport(process: Process) -> tuple[Tensor, Tensor]:
    """Unit noise (N, 1) at t = 1, and the data (N, 1) that the ODE takes it to."""
    alpha, sigma = (v.item() for v in process.scales(torch.ones(1, dtype=torch.float64)))
    noisy = inverse(quantiles(), (alpha**2 * STD**2 + sigma**2) ** 0.5, alpha)
    return (noisy / sigma).float()[:, None], inverse(quantiles(), STD).float()[:, None]


def inverse(share: Tensor, std: float, scale: float = 1.0) -> Tensor:
    """Where two modes, so scaled and of this deviation, have these shares below; by bisection."""
    low, high = torch.full_like(share, -8 * std - 2), torch.full_like(share, 8 * std + 2)
    for _ in range(80):
        middle = (low + high) / 2
        below = sum(torch.special.ndtr((middle - scale * m) / std) for m in MEANS) / 2 < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@torch.no_grad()
def error(sampled: Callable[[Tensor], Tensor], process: Process) -> float:
    """The mean distance of a sampler's data to the map's."""
    z, x = transport(process)
    return (sampled(z) - x).abs().mean().item()


@torch.no_grad()
def renoised_error(student: Generator, process: Process) -> float:
    """Of two steps with new noise, which keep no quantile: the distance between sorted samples."""
    torch.manual_seed(0)
    x = student(torch.randn(200 * QUANTILES, 1))
    return (x[:, 0].sort().values[100::200] - transport(process)[1][:, 0]).abs().mean().item()


def teacher_errors() -> dict[int, float]:
    """Of the teacher's DDIM in one and two steps."""
    teacher, process = modes(), PROCESSES["edm"]
    middle = process.time(torch.tensor([MIDDLE]))
    grids = {1: torch.ones(1), 2: torch.cat([torch.ones(1), middle])}
    sigma = process.scales(torch.ones(1))[1]
    return {k: error(lambda z, g=g: ddim(teacher, z * sigma, g), process) for k, g in grids.items()}


def measure(row: Row, updates: int) -> dict[str, float]:
    """A row's errors at its step counts."""
    started = time.monotonic()
    student = train(row, updates)
    process: Any = student.denoiser.process
    figures = {}
    for k in row.counts:
        few = student.at(k) if k in student.counts else student
        renoised = k > 1 and row.renoise
        figures[str(k)] = renoised_error(few, process) if renoised else error(few, process)
    return {**figures, "seconds": time.monotonic() - started}


def table(results: dict[str, dict[str, float]], untrained: dict[int, float]) -> str:
    """The results in Markdown."""
    lines = ["| objective | 1 step | 2 steps |", "|---|---|---|"]
    for name, figures in results.items():
        cells = [f"{figures[k]:.3f}" if k in figures else "" for k in ("1", "2")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    own = " | ".join(f"{untrained[k]:.3f}" for k in (1, 2))
    return "\n".join([*lines, f"| teacher, DDIM | {own} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="Names of rows; by default all.")
    parser.add_argument("--steps", type=int, default=4000, help="Updates of each student.")
    parser.add_argument("--json", type=Path, help="Keep the results in this file.")
    parser.add_argument("--markdown", type=Path, help="Write the table to this file.")
    options = parser.parse_args()
    if unknown := [r for r in options.rows if r not in ROWS]:
        sys.exit(f"{unknown[0]!r} is no row; known: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in options.rows or ROWS:
        kept[name] = measure(ROWS[name], options.steps)
        sys.stdout.write(f"{name}: {kept[name]}\n")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    text = table({name: kept[name] for name in ROWS if name in kept}, teacher_errors())
    sys.stdout.write(f"{text}\n")
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
