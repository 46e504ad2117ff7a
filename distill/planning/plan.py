"""What a run would take: the real step, played on tensors without memory.

The objective's own turns run forward and backward on fake tensors, and a meter tracks the bytes of
those that are alive. So the figures come from the code that will run, not from a separate formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.objectives.base import Batch, Objective, Turn
from distill.profiling import (
    EagerAutocast,
    FusedAttention,
    Meter,
    denoisers_in,
    evaluations_of,
    unique,
)
from distill.rates import GPUS, Gpu, Share, share_of

__all__ = ["GPUS", "RESERVE", "Gpu", "Plan", "advice", "play"]

GB = 1e9
RESERVE = 1.0  # GB that CUDA's context and libraries take


@dataclass
class Plan:
    """What a run would take, in bytes, FLOPs and network evaluations for each step.

    Args:
        weights: Every network's, each counted once.
        gradients: The most at one time.
        optimizer: All players' moments on the device.
        average: The student's EMA.
        activations: The most in a turn, beside all of the above.
        beside: Text encoders and VAE, which are loaded until data are cached.
        base: Parameters of the teacher.
        batch, precision: The recipe's; precision is the teacher's where train.precision is fp32.
        evaluations: Samples through each network in one step, on average.
        flops: Of one step, on average.
        host: Moments in host memory.
        build: The most before step 0: first while data are encoded, before the objective's networks
            are there; then in the export's rehearsal, with the VAE beside them. The activations of
            text encoders are not counted.
        grids: The most while sample grids are drawn; the averaged weights are there twice then.
        family, adapter: Of the networks, as measured rates name them; adapter is "full" or a kind.
        smaller: Of a student of another architecture: its weights, and the share of the work of one
            pass of the teacher's network that its own is.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    beside: int
    base: int
    batch: int
    precision: str
    evaluations: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    host: int = 0
    build: int = 0
    grids: int = 0
    family: str = ""
    adapter: str = "full"
    smaller: tuple[int, float] | None = None

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the peak, in GB."""
        names = ("weights", "gradients", "optimizer", "average", "activations")
        return {k: getattr(self, k) / GB for k in names}

    @property
    def peak(self) -> float:
        """Peak memory in GB, without CUDA's own."""
        return sum(self.parts.values())

    @property
    def most(self) -> float:
        """The same, before step 0 and between steps as well."""
        return max(self.peak, self.build / GB, self.grids / GB)

    @property
    def bytes_per_base_param(self) -> float:
        """Bytes of weights and optimiser state; 28 for three copies in fp32 under Adam."""
        return (self.weights + self.optimizer) / self.base

    def share(self, name: str) -> Share:
        """The share of the rate of a card in GPUS that training is expected to reach."""
        return share_of(name, self.family, self.adapter, self.precision)

    def seconds(self, share: Share) -> float:
        """Of one step."""
        return self.flops / (share.tflops * 1e12 * share.value)

    def tree(self, name: str, gpu: Gpu) -> dict[str, Any]:
        """As plain data, for --json."""
        share = self.share(name)
        hours = self.seconds(share) * 1000 / 3600
        return {
            "gpu": name,
            "peak_gb": self.peak,
            "fits": self.most + RESERVE <= gpu.memory,
            "bytes_per_base_param": self.bytes_per_base_param,
            "parts_gb": self.parts,
            "encoders_gb": self.beside / GB,
            "build_gb": self.build / GB,
            "grids_gb": self.grids / GB,
            "host_gb": self.host / GB,
            "base_params": self.base,
            "batch": self.batch,
            "evaluations_per_step": self.evaluations,
            "tflop_per_step": self.flops / 1e12,
            "hours_per_1k_steps": hours,
            "dollars_per_1k_steps": hours * gpu.price,
            "share_of_peak": share.value,
            "share_source": share.source or "assumed",
            **({} if share.source else {"assumed_share_of_peak": share.value}),
            **(
                {}
                if self.smaller is None
                else {"student_params": self.smaller[0], "student_work": self.smaller[1]}
            ),
        }


def play(
    objective: Objective,
    players: dict[str, list[nn.Parameter]],
    batch: Batch,
    parts: int,
    steps: int,
    precision: str,
    compiled: bool = True,
    first: int = 0,
) -> tuple[int, int, float, dict[str, float]]:
    """Play the turns of `steps` steps of the objective, each kind once, without updates.

    Args:
        batch: One of the `parts` that a step's batch is cut into.
        first: The first of the steps; later stages of training have other turns.
        compiled: Whether the run compiles its networks, which keeps fewer activations.

    Returns:
        The most bytes of activations, the most of gradients, and the FLOPs and the samples through
        each network of an average step.
    """
    networks = {k: v for k, v in vars(objective).items() if isinstance(v, nn.Module)}
    tensors = [t for n in networks.values() for t in [*n.parameters(), *n.buffers()]]
    tensors += [*(batch.cond or {}).values(), batch.noise]
    kinds: dict[tuple[str, ...], Cost] = {}
    plays: list[tuple[str, ...]] = []
    with evaluations_of(denoisers_in(networks)) as counts:
        for step in range(first, first + steps):
            for turn in objective.turns(step):
                plays.append(turn.players)
                if turn.players not in kinds:
                    moving = [p for name in turn.players for p in players[name]]
                    cost = _cost(turn, batch, parts, moving, tensors, precision, counts, compiled)
                    kinds[turn.players] = cost
    scale = parts / steps
    return (
        max(c.activations for c in kinds.values()),
        max(c.gradients for c in kinds.values()),
        sum(kinds[k].flops for k in plays) * scale,
        {n: sum(kinds[k].evaluations[n] for k in plays) * scale for n in networks},
    )


@dataclass
class Cost:
    """What one turn takes."""

    activations: int
    gradients: int
    flops: float
    evaluations: dict[str, int]


def _cost(
    turn: Turn,
    batch: Batch,
    parts: int,
    moving: list[nn.Parameter],
    tensors: list[Tensor],
    precision: str,
    counts: dict[str, int],
    compiled: bool,
) -> Cost:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for p in moving:
        p.requires_grad_(True)
    before = dict(counts)
    known = {t.untyped_storage()._cdata for t in tensors}
    functions = FusedAttention if compiled else EagerAutocast
    with Meter(known) as meter, functions(meter):
        if parts > 1:  # the first part's gradients stay while the others are computed
            for p in moving:
                p.grad = torch.zeros_like(p)
        # as in a run: casts are not cached; the CPU's autocast, since fake tensors are on the CPU
        with torch.autocast(
            "cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
        ):
            loss = turn.loss(batch)
        loss.value.backward()
        del loss
    gradients = unique(p.grad for p in moving if p.grad is not None)
    for p in moving:
        p.grad = None
        p.requires_grad_(False)
    return Cost(
        meter.most - gradients,
        gradients,
        float(meter.flops),
        {k: v - before[k] for k, v in counts.items()},
    )


def advice(recipe: Recipe, plan: Plan, gpu: Gpu) -> list[str]:
    """Which keys to change when the plan does not fit, those that save most first."""
    if plan.most + RESERVE <= gpu.memory:
        return []
    if plan.peak + RESERVE <= gpu.memory:
        if plan.build / GB + RESERVE <= gpu.memory:
            return ["train.sample_every: 0 draws no grids in training"]
        return ["a larger card: encoding and the rehearsal need it before training, which does not"]
    teacher, train, adapters = recipe.teacher, recipe.train, recipe.adapters
    rank = 0 if adapters is None else adapters.rank
    parts = train.accumulate
    divisible = max(plan.parts, key=plan.parts.__getitem__) == "activations" and train.batch > parts
    quantisable = adapters is not None and teacher.precision in ("bf16", "fp16", "fp8")
    choices = {
        "adapters: {rank: 64} keeps one set of weights instead of three": adapters is None,
        "teacher.precision: bf16 halves the frozen weights": teacher.precision in (None, "fp32"),
        "train.precision: bf16 halves the activations": train.precision == "fp32",
        "train.checkpointing: true recomputes activations instead of keeping them": (
            not train.checkpointing
        ),
        "players.NAME.optimizer: adamw8bit keeps a quarter, adamw-offloaded nothing": (
            plan.optimizer / GB > plan.peak / 5
        ),
        "teacher.precision: nf4 keeps the frozen weights in a little over four bits": quantisable,
        f"train.accumulate: {2 * parts} halves the activations at the same batch": divisible,
        f"adapters.rank: {rank // 2} halves the trained weights": rank > 16,
    }
    return [text for text, helps in choices.items() if helps] or [
        "teacher.size: a smaller one, or a larger card"
    ]
