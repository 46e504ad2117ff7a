"""TinyFusion: which units of a network go is learned, by the loss after a little recovery.

Fang et al. 2024 (arXiv:2412.01199). The units stand in groups of M, in the network's order, and N
of each group stay. All C(M, N) ways to keep N are listed, with a logit each; the Gumbel-softmax
draws one of them for each sample and group, hard in the forward pass and soft in the backward one,
and what is not kept passes its input on. The logits learn together with a change of the weights
(`recovery`: LoRA, by the section `adapters`; without it, all of them), by the diffusion loss on
data. So a choice is judged by what a trained network would lose, and not by what this one does.

`distill teach` trains it and leaves a copy of the teacher's folder without the units that the
averaged logits rank last (`distill/pretrain/gates.py`); what `recovery` learned is thrown away. The
objective `compress` with `scale: masked` is the paper's recovery. Costs a forward of one network.

Differs from the authors' code, which knows DiT alone: units of UNets as well, in one group or more;
a share of conditions becomes the null one here, where theirs leaves that to the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.field_types import Fraction, Positive, PositiveInt
from distill.objectives.base import Auxiliary, Batch, Learns, Loss, Objective, Turn
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import Times, Uniform
from distill.objectives.smaller.compress import with_null
from students.architecture.gates import gated
from students.architecture.units import units
from students.schedulers import source_of
from teachers.denoiser import Denoiser
from teachers.errors import UserError
from teachers.teacher import Teacher

SCALE, FIRST = 100.0, 0.02  # the logits are 100 weights, each of which starts here
MOST = 20_000  # ways of a group, of which each has a logit


class DepthGates(Auxiliary):
    """A logit for each way to keep some of a group's units; `shape` makes them.

    Attributes:
        units: Names of all units of the teacher's network, in its order.
        ways: Every way to keep N of M: 1 for what stays, else 0; (C, M).
        weights: Of each group and way, (G, C); the logits are `SCALE` times as large.
    """

    ways: Tensor

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.units = names

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        return cls([*units(source_of(teacher).backbone)])

    def shape(self, keep: int, of: int, device: torch.device) -> None:
        """Make the logits of all ways to keep `keep` of each `of` units, all equally likely.

        Raises:
            UserError: the units do not divide into such groups, or the ways are too many.
        """
        if keep >= of:
            raise UserError(f"objective.keep: {keep} of {of} layers are all; give less than of")
        if not self.units or len(self.units) % of:
            raise UserError(
                f"objective.of: the network has {len(self.units)} layers that can go, which are "
                f"no groups of {of}; set it to a divisor, such as {len(self.units)}"
            )
        if (count := comb(of, keep)) > MOST:
            raise UserError(
                f"objective.of: there are {count:,} ways to keep {keep} of {of}; make smaller "
                f"groups, of at most {MOST:,} ways"
            )
        rows = [[float(i in kept) for i in range(of)] for kept in combinations(range(of), keep)]
        self.register_buffer("ways", torch.tensor(rows).to(device), persistent=False)
        groups = len(self.units) // of
        self.weights = nn.Parameter(torch.full((groups, count), FIRST, device=device))

    def forward(self, rows: int, temperature: float) -> Tensor:
        """Gates (B, U) of all units, for B = `rows`: 0 or 1, with the gradient of soft ones."""
        logits = (SCALE * self.weights).expand(rows, -1, -1)
        choice = F.gumbel_softmax(logits, temperature, hard=True)
        return (choice @ self.ways).flatten(1)

    def probabilities(self) -> Tensor:
        """Of each group's ways, (G, C)."""
        return (SCALE * self.weights).softmax(1)

    def removed(self) -> list[str]:
        """The units that go: those that the likeliest way of each group leaves out."""
        kept = self.ways[self.weights.argmax(1)].flatten().tolist()
        return [name for name, stays in zip(self.units, kept, strict=True) if not stays]


@dataclass(kw_only=True)
class TinyFusion(Objective):
    recovery: Denoiser
    gates: DepthGates
    keep: PositiveInt = 1  # how many units of each group stay
    of: PositiveInt = 2  # units of a group
    temperature: Positive = 4.0  # of the Gumbel-softmax at the first step
    last_temperature: Positive = 0.1  # and from `anneal_steps` on, linearly
    anneal_steps: PositiveInt = 1000
    times: Times = Uniform(0.0, 1.0)
    drop: Fraction = 0.1  # share of conditions that become the null one

    few_step: ClassVar[bool] = False
    trains: ClassVar[str] = "gates"
    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        self.gates.shape(self.keep, self.of, next(self.teacher.parameters()).device)

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("recovery", "gates"), partial(self.loss, step=step))

    def loss(self, batch: Batch, step: int) -> Loss:
        network, x = self.recovery, batch.data
        cond = with_null(self.teacher, batch.cond, self.drop)
        t = self.times.sample(x, network.process)
        x_t = network.process.noise(x, t, batch.noise)
        gates = self.gates(len(x), self.temperature_at(step))
        with gated(network, dict(zip(self.gates.units, gates.unbind(1), strict=True))):
            out = network(x_t, t, cond)
        likeliest = self.gates.probabilities().amax(1).mean()
        loss = (network.weight(t) * mean_square(out, x)).mean()
        return Loss(loss, {"likeliest": likeliest.detach()})

    def smaller(self) -> dict[str, Any]:
        """What goes, and how likely each group's choice is."""
        likeliest = self.gates.probabilities().amax(1).tolist()
        return {"remove": self.gates.removed(), "likeliest": likeliest}

    def temperature_at(self, step: int) -> float:
        """The Gumbel-softmax's temperature at a training step."""
        done = min(1.0, step / self.anneal_steps)
        return self.temperature + done * (self.last_temperature - self.temperature)
