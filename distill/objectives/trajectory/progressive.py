"""Progressive distillation: one student step learns two teacher steps; then it is the teacher.

Salimans & Ho 2022 (arXiv:2202.00512). The target is the x̂ whose single DDIM step lands where the
teacher's two do; by default the loss is the larger of the errors of x̂ and of ε̂,
max(SNR, 1)|x̃ - x̂|². `weighting` has the paper's others: `v`, `eps` and `x`. Every step draws its
place of the grid evenly.

Costs 1 forward of the student and 2 of the teacher (4 in the first stage if it is guided).

Differs from the authors' code: the grid is uniform in the process's own t (σ^(1/ρ) for EDM, as in
openai/consistency_models), and the last stage uses the student's own times; the first stage
distils the teacher's guidance, if there is any. The student's head is its teacher's: x, v or EDM's
F, since x̂ is all that the loss sees. A head of x and ε at once would be another network.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.field_types import PositiveInt
from distill.objectives.base import Batch, Learns, Loss, Objective, Turn
from distill.objectives.losses import mean_square
from distill.objectives.weights import Weighting, error_weight
from teachers.denoiser import Denoiser
from teachers.errors import UserError


@dataclass(kw_only=True)
class Progressive(Objective):
    initial_steps: PositiveInt = 16  # of the student in stage one; its teacher takes twice as many
    stage_steps: PositiveInt = 1000  # training steps per stage; the last stage has the rest
    weighting: Weighting = "truncated-snr"  # of |x̃ - x̂|²

    learns: ClassVar[Learns] = "one-chain"  # the last stage's

    def __post_init__(self) -> None:
        last = len(self.student.times)
        self.grids = [self.initial_steps]
        while self.grids[-1] > last and self.grids[-1] % 2 == 0:
            self.grids.append(self.grids[-1] // 2)
        if self.grids[-1] != last:
            raise UserError(
                f"objective.initial_steps: repeated halving of {self.initial_steps} does not give "
                f"the student's {last} steps; set it to {last * 16}"
            )
        if last > 1 and self.student.renoise:
            raise UserError(
                "student.renoise: progressive students of several steps follow the ODE; set it to "
                "false, or set student.steps to 1"
            )
        self.stage = 0

    def turns(self, step: int) -> Iterator[Turn]:
        stage = self.stage_at(step)
        if reset := stage > self.stage:
            self.teacher, self.stage = self.promoted(), stage
        yield Turn(("student",), partial(self.loss, step=step), reset)

    @property
    def last_stage(self) -> int:
        return (len(self.grids) - 1) * self.stage_steps

    def stage_at(self, step: int) -> int:
        """The stage of a training step, from 0."""
        return min(step // self.stage_steps, len(self.grids) - 1)

    def promoted(self) -> Denoiser:
        """A frozen copy of the student."""
        return deepcopy(self.student.denoiser).eval().requires_grad_(False)

    def loss(self, batch: Batch, step: int) -> Loss:
        t, m, r = self.step_times(batch.data)
        x_t = self.student.denoiser.process.noise(batch.data, t, batch.noise)
        with torch.no_grad():
            target = self.target(x_t, t, m, r, batch.cond)
        return self.error(x_t, t, target, batch)

    def error(self, x_t: Tensor, t: Tensor, target: Tensor, batch: Batch) -> Loss:
        """The weighted square error of the student's x̂ at x_t (B, ...)."""
        weight = error_weight(self.weighting, self.student.denoiser.process, t).to(x_t.dtype)
        x = self.student.denoiser(x_t, t, batch.cond)
        error = mean_square(x, target)
        return Loss((weight * error).mean(), {"error": error.detach().mean()}, x)

    def step_times(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step t → r of this stage's grid and its middle m, each (B,), uniform over the grid."""
        grid = self.grid().to(x.device, torch.float32, non_blocking=True)
        i = torch.randint(len(grid) - 1, (len(x),), device=x.device)
        t, r = grid[i], grid[i + 1]
        return t, (t + r) / 2, r

    def grid(self) -> Tensor:
        """This stage's times and a final 0: (n + 1,), float64."""
        n, times = self.grid_size(), self.student.times
        if n == len(times):
            return torch.tensor([*times, 0.0], dtype=torch.float64)
        return times[0] * torch.linspace(1, 0, n + 1, dtype=torch.float64)

    def grid_size(self) -> int:
        """The number of steps of this stage's student."""
        return self.grids[self.stage]

    def target(self, x_t: Tensor, t: Tensor, m: Tensor, r: Tensor, cond: Any) -> Tensor:
        """The x̂ whose step t → r equals the teacher's t → m → r; at r = 0 its second x̂."""
        process = self.student.denoiser.process
        x_m = process.step(x_t, self.teacher(x_t, t, cond), t, m)
        x = self.teacher(x_m, m, cond)
        x_r = process.step(x_m, x, m, r)
        last = (r == 0).view(-1, *(1,) * (x.ndim - 1))
        return torch.where(last, x, process.end(x_t, x_r, t, r))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"stage": self.stage}
        if self.stage:
            state["teacher"] = self.teacher.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]
        if self.stage:
            self.teacher = self.promoted()
            self.teacher.load_state_dict(state["teacher"])
