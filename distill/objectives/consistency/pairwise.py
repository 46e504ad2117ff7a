"""What all objectives share that make the student's x̂ at two times t > r equal.

Targets carry no gradient. The student's parametrisation makes x̂ = x_t at t = 0. Differs from the
papers: distances are between pixels or latents, since LPIPS is not defined at 8×8.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative
from distill.objectives.base import Batch, Learns, Loss, Objective, Turn
from distill.objectives.losses import huber
from teachers.denoiser import Denoiser
from teachers.process import expand


@dataclass(kw_only=True)
class Pairwise(Objective):
    """Descends weight(t, r) · distance(x̂ at t, x̂ at r); subclasses choose the pairs and x_r."""

    distance: Literal["huber", "square"] = "huber"  # huber: √(|Δ|² + c²) - c over a whole sample
    huber_c: NonNegative | None = None  # c itself; by default iCT's 0.00054 √d (arXiv:2310.14189)
    target_ema: Fraction = 0.0  # EMA of the target network; 0 uses the student itself

    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        self.target: Denoiser = self.student.denoiser
        if self.target_ema:
            self.target = deepcopy(self.target).requires_grad_(False)

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("student",), partial(self.loss, step=step))
        if self.target_ema:  # after the student's update
            with torch.no_grad():
                mean: list[Tensor] = list(self.target.parameters())
                now: list[Tensor] = list(self.student.denoiser.parameters())
                torch._foreach_lerp_(mean, now, 1 - self.kept(step))

    def kept(self, step: int) -> float:
        """The share that the target network keeps of itself in a step."""
        return self.target_ema

    def loss(self, batch: Batch, step: int) -> Loss:
        t, r = self.sample_times(batch.data, step)
        x, target = self.pair(t, r, batch)
        gap = self.distances(x, target)
        return Loss((self.weight(t, r) * gap).mean(), {"distance": gap.detach().mean()}, x)

    def pair(self, t: Tensor, r: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's x̂ at t, and its target at r, which has no gradient; (B, ...) each."""
        x_t = self.student.denoiser.process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            x_r = self.ode_step(x_t, t, r, batch)
            target = self.boundary(self.target(x_r, r, batch.cond), x_r, r, batch)
        return self.student.denoiser(x_t, t, batch.cond), target

    def sample_times(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Times t > r (B,) for data x (B, ...)."""
        raise NotImplementedError

    def ode_step(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """x_r (B, ...), on a path through x_t."""
        raise NotImplementedError

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """Each pair's weight (B,)."""
        raise NotImplementedError

    def boundary(self, target: Tensor, x_r: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """The target (B, ...); where r is 0, the end of the path."""
        return torch.where(expand(r == 0, x_r), x_r, target)

    def distances(self, x: Tensor, target: Tensor) -> Tensor:
        """The distance (B,), over the whole sample."""
        if self.distance == "square":
            return (x - target).square().flatten(1).sum(1)
        c = 0.00054 * x[0].numel() ** 0.5 if self.huber_c is None else self.huber_c
        return huber(x, target, c)

    def ratio(self, t: Tensor) -> Tensor:
        """σ/α at t (B,), the time in which these methods are written."""
        alpha, sigma = self.student.denoiser.process.scales(t.double())
        return (sigma / alpha).to(t.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target.state_dict()} if self.target_ema else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.target_ema:
            self.target.load_state_dict(state["target"])
