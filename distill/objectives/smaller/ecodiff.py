"""EcoDiff: which attention heads and neurons of a network go is learned, by the end of its chain.

Zhang et al. 2024 (arXiv:2412.02852). Every head of an attention and every neuron of a feed-forward
layer has a gate, s = clip(1.2 sigmoid((logit u + λ) / 0.83) - 0.1, 0, 1) of uniform u, by which
what leaves it is multiplied; only λ learns. The loss is the distance of two samples of the same
noise, one by the network with gates and one without, and `sparsity` times a penalty: the expected
share of open gates, P(s > 0) = sigmoid(λ + 1.99), a mean over layers (`l0`), or of |λ| (`l1`). One
u is drawn for each sample and holds for all steps of its chain, through which gradients flow; so
the teacher is a student of a few steps.

`distill teach` trains it and leaves a copy of the teacher's folder without the `prune` heads and
neurons of the smallest averaged λ (`distill/pretrain/gates.py`). Costs two chains of the teacher.

Differs from the authors' code, which draws u at every evaluation, also where the backward pass
repeats one, and whose penalty, `l1`, pulls λ to 0, at which a gate is open with P = 0.88. Here one
head or neuron of a layer stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from distill.field_types import Fraction, NonNegative, Positive
from distill.objectives.base import Auxiliary, Batch, Loss, Objective, Turn
from distill.objectives.losses import mean_square
from students.architecture.change import REDUCED
from students.architecture.gates import narrowed
from students.architecture.units import Width, widths
from students.generator import Generator
from students.schedulers import source_of
from teachers.errors import UserError
from teachers.teacher import Teacher

TEMPERATURE, LOW, HIGH = 0.83, -0.1, 1.1  # of the hard-concrete distribution (arXiv:1712.01312)


class WidthGates(Auxiliary):
    """A number λ, `weights` (U,), for each head and neuron, in the order of the layers."""

    def __init__(self, layers: dict[str, Width]) -> None:
        super().__init__()
        self.layers = layers
        self.weights = nn.Parameter(torch.zeros(sum(w.count for w in layers.values())))

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        backbone = source_of(teacher).backbone
        if type(backbone).__name__.removeprefix("Reduced") not in REDUCED:
            raise UserError(
                f"teacher.source: of a {type(backbone).__name__} no heads or neurons can be cut; "
                "give a UNet, or the objective tinyfusion"
            )
        return cls(widths(backbone))

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values (..., U) of all heads and neurons, by layer."""
        parts = values.split([w.count for w in self.layers.values()], -1)
        return dict(zip(self.layers, parts, strict=True))

    def forward(self, rows: int) -> dict[str, Tensor]:
        """Gates (B, count) of the inputs of linear layers, by their names, for B = `rows`."""
        u = torch.rand(rows, len(self.weights), device=self.weights.device)
        return {self.layers[k].out: v for k, v in self.split(gates(u, self.weights)).items()}

    def open(self) -> Tensor:
        """The probability (U,) that a gate is not 0."""
        return torch.sigmoid(self.weights - TEMPERATURE * log(-LOW / HIGH))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over layers of the means of values (U,) in them: ()."""
        return torch.stack([v.mean() for v in self.split(values).values()]).mean()

    def kept(self, prune: float) -> dict[str, list[int]]:
        """What stays of each layer: all but the share `prune` of all heads, and of all neurons,
        that has the smallest λ; and of each layer the one of the largest."""
        ranks, stays = self.split(self.weights.detach().cpu()), dict[str, Tensor]()
        for kind in ("heads", "neurons"):
            names = [n for n, w in self.layers.items() if w.kind == kind]
            order = torch.cat([ranks[n] for n in names] or [torch.zeros(0)]).argsort(stable=True)
            stay = torch.ones(len(order), dtype=torch.bool)
            stay[order[: round(prune * len(order))]] = False
            for name, part in zip(names, stay.split([len(ranks[n]) for n in names]), strict=True):
                part[ranks[name].argmax()] = True
                stays[name] = part
        return {n: stays[n].nonzero().flatten().tolist() for n in self.layers}


def gates(u: Tensor, weights: Tensor) -> Tensor:
    """Hard-concrete gates (B, U) in [0, 1] of uniform u (B, U) and λ (U,)."""
    soft = torch.sigmoid((torch.logit(u, 1e-6) + weights) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


@dataclass(kw_only=True)
class EcoDiff(Objective):
    gates: WidthGates
    prune: Fraction = 0.2  # share of heads, and of neurons, that goes
    sparsity: NonNegative = 0.5  # weight of the penalty
    penalty: Literal["l0", "l1"] = "l0"
    first: Positive = 3.0  # λ before training
    times: Annotated[tuple[Fraction, ...], MinLen(1)] = (1.0,)  # of the chain's steps, falling
    renoise: bool = True  # whether its steps add fresh noise, or follow the ODE

    needs_data: ClassVar[Literal["never"]] = "never"
    few_step: ClassVar[bool] = False
    trains: ClassVar[str] = "gates"

    def __post_init__(self) -> None:
        if not 0 < self.prune < 1:
            raise UserError(f"objective.prune: {self.prune:g} leaves nothing to choose; give 0.2")
        nn.init.constant_(self.gates.weights, self.first)
        try:
            chain = Generator(self.teacher, self.times, self.renoise)
        except ValueError:
            raise UserError(
                f"objective.times: {list(self.times)} do not fall; write them from noise to data"
            ) from None
        self.chain = (chain,)  # in a tuple: no network of the objective's own

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("gates",), self.gates_loss)

    def gates_loss(self, batch: Batch) -> Loss:
        """How far gates move samples, and how many are open."""
        (chain,), z, cond = self.chain, batch.noise, batch.cond
        noises = [torch.randn_like(z) for _ in self.times[1:]]
        with torch.no_grad():
            whole = chain(z, cond, noises=noises)
        with narrowed(self.teacher, self.gates(len(z))):
            found = chain(z, cond, noises=noises, whole_chain=True)
        distance, share = mean_square(found, whole).mean(), self.gates.mean(self.gates.open())
        lasso = self.gates.mean(self.gates.weights.abs())
        value = distance + self.sparsity * (share if self.penalty == "l0" else lasso)
        return Loss(value, {"distance": distance.detach(), "open": share.detach()})

    def smaller(self) -> dict[str, Any]:
        """The layers that keep less, as `student.architecture.change` has them."""
        stays = self.gates.kept(self.prune).items()
        layers = self.gates.layers
        return {"change": {n: {"kind": layers[n].kind, "keep": v}
                           for n, v in stays if len(v) < layers[n].count}}  # fmt: skip
