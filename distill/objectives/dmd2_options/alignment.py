"""Off-trajectory alignment: the student is right also beside its own chains.

CDM, Liu et al. 2026 (arXiv:2605.06376). From a state x_i of a chain the student's own velocity
there leads in one straight step to another time s, lower or higher. Its x̂ at that place is matched
as the chain's is, without the teacher's guidance unless `guided`. As in CDM's released code;
LightX2V's guides the teacher, and has the weight rise over 200 steps.
"""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from distill.field_types import Fraction, Positive
from distill.objectives.base import Batch, Loss
from distill.objectives.dmd2_options.matching import Matching
from distill.objectives.losses import surrogate
from distill.objectives.noise_levels import Uniform
from students.generator import Generator


@dataclass(frozen=True, config={"extra": "forbid"})
class Alignment:
    """The term's weight, the times s that it leads to, and whether its teacher is guided."""

    weight: Positive = 1.0
    low: Fraction = 0.02
    high: Fraction = 0.98
    guided: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"low, {self.low}, must be above 0 and below high, {self.high}")

    def added(
        self, loss: Loss, objective: Matching, student: Generator, start: tuple[Tensor, Tensor],
        x: Tensor, batch: Batch,
    ) -> Loss:  # fmt: skip
        """A loss with this term.

        Args:
            start: Where each sample's last step began: x_t (B, ...) and t (B,).
            x: Its x̂ (B, ...).
        """
        process = student.denoiser.process
        s = Uniform(self.low, self.high).sample(x, process).to(start[1])
        beside = process.step(start[0], x.detach(), start[1], s)
        again = student.denoiser(beside, s, batch.cond, torch.zeros_like(s))
        grad, _ = objective.gradient(again, s, batch, guided=self.guided)
        term = surrogate(again, grad)
        bend = (again - x).detach().abs().mean()  # 0 where paths are straight
        logs = {**loss.logs, "alignment": term, "bend": bend}
        return Loss(loss.value + self.weight * term, logs, loss.samples)
