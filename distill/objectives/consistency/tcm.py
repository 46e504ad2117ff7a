"""TCM: a second stage of consistency for high noise alone; a frozen first stage has the rest.

Lee et al. 2024 (arXiv:2410.14895). Below the noise level `boundary_level` the consistency function
is that of the first stage. Pairs of times t > r lie above it, except that the earlier time of
`boundary_share` of the batch is below: their target is the first stage's, and holds the rest fast.

The first stage is ECT, in the run's first `first_steps` steps. With `first_steps: 0` it is the
student as the run begins, such as an earlier run's (`student.init`).

A step of the second stage takes 2 + (1 - boundary_share) forward passes and one backward pass.
Differs from the paper: the first stage's last weights are frozen, not their average.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from distill.field_types import Finite, NonNegative, NonNegativeInt, Positive
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.consistency.consistency import ConsistencyTuning
from distill.objectives.noise_levels import LogStudent, Times
from teachers import conditions
from teachers.denoiser import Denoiser
from teachers.errors import UserError
from teachers.process import expand


@dataclass(kw_only=True)
class TruncatedConsistency(ConsistencyTuning):
    first_steps: NonNegativeInt = 0  # steps of the first stage
    boundary_level: Positive = 1.0  # σ/α below which the first stage is asked
    boundary_share: Annotated[float, *Finite, Gt(0), Lt(1)] = 0.25  # of a batch, at that level
    boundary_weight: NonNegative = 0.1  # of their mean loss
    far_times: Times = LogStudent(0.0, 0.2, 0.01)  # of t in the second stage

    def __post_init__(self) -> None:
        super().__post_init__()
        self.frozen: Denoiser | None = None
        if self.target_ema:
            raise UserError("objective.target_ema: the target is the student itself; set it to 0")
        lowest = self.ratio(torch.tensor([self.student.times[-1]], dtype=torch.float64)).item()
        if lowest < self.boundary_level:
            raise UserError(
                f"student.steps: the last step starts at the noise level {lowest:.3g}, which is "
                f"below objective.boundary_level, {self.boundary_level:g}, where the student "
                "learns nothing; lower one of them"
            )

    @property
    def last_stage(self) -> int:
        return self.first_steps

    def check_batch(self, shape: tuple[int, ...]) -> None:
        size = shape[0]
        if ceil(self.boundary_share * size) == size:
            raise UserError(
                f"objective.boundary_share: {self.boundary_share:g} of a part of {size} samples is "
                "all of it; lower it, raise train.batch, or lower train.accumulate"
            )

    def turns(self, step: int) -> Iterator[Turn]:
        if step == self.first_steps:
            self.freeze()
        reset = 0 < self.first_steps == step
        yield Turn(("student",), partial(self.loss, step=step), reset=reset)

    def freeze(self) -> None:
        """Keep the student as it is for the noise levels below the boundary."""
        self.frozen = deepcopy(self.student.denoiser).requires_grad_(False)

    def loss(self, batch: Batch, step: int) -> Loss:
        if step < self.first_steps:
            return super().loss(batch, step)
        f, process = self.student.denoiser, self.student.denoiser.process
        count = ceil(self.boundary_share * len(batch.data))
        t = self.times_above(batch.data, count)
        r = self.earlier(t, step)
        x_t = process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            target = self.targets(self.ode_step(x_t, t, r, batch), r, batch, count)
        x = f(x_t, t, batch.cond)
        gap = self.distances(x, target)
        value = self.weight(t, r) * gap
        edge, rest = value[:count].mean(), value[count:].mean()
        logs = {"distance": gap.detach()[count:].mean(), "edge": gap.detach()[:count].mean()}
        return Loss(rest + self.boundary_weight * edge, logs, x)

    def times_above(self, x: Tensor, count: int) -> Tensor:
        """Times (B,) above the boundary; of the first `count` samples, the boundary itself."""
        process = self.student.denoiser.process
        t = self.far_times.sample(x, process)
        level = torch.full((), self.boundary_level, dtype=torch.float64, device=x.device)
        edge = process.time(level).to(t.dtype)
        first = torch.arange(len(x), device=x.device) < count
        return torch.where(first, edge, torch.maximum(t, edge))

    def targets(self, x_r: Tensor, r: Tensor, batch: Batch, count: int) -> Tensor:
        """x̂ at r (B, ...): the first stage's below the boundary, else the student's.

        The first `count` samples are below it. The others are asked of both networks, since which
        are below is known on the device alone.
        """
        assert self.frozen is not None, "the second stage begins in turns()"
        below = self.boundary(self.frozen(x_r, r, batch.cond), x_r, r, batch)
        above = self.target(x_r[count:], r[count:], conditions.rows(batch.cond, slice(count, None)))
        low = expand(self.ratio(r) < self.boundary_level, x_r)
        return torch.where(low, below, torch.cat([below[:count], above]))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.frozen is None else {"frozen": self.frozen.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "frozen" in state:
            self.freeze()
            assert self.frozen is not None
            self.frozen.load_state_dict(state["frozen"])
