"""Discriminator guidance: a critic tells data from the teacher's samples, and moves the teacher.

Kim et al. 2022 (arXiv:2211.17091). The teacher's own model is q and the data's p. A critic on the
frozen teacher's features is trained by the logistic loss, data against samples of the teacher, both
noised to the same distribution of times:

    softplus(-ℓ(data_t)) + softplus(ℓ(sample_t))

Its optimum is ℓ = log p_t/q_t, so ∇ℓ is the error of the teacher's score. `teacher.discriminator`
of any recipe adds it to the teacher (`teachers/guidance.py: DiscriminatorGuided`). No student is
trained: `distill teach` trains the critic and saves it beside figures of the teacher with it and
without. The average of the critic's weights over training is what is saved.

Times are uniform in log σ/α, which is the paper's importance sampling. Costs, for each noise level,
1 forward of the teacher to its last block that is read, for data and for samples; and the samples
`solver_steps` of the solver, which `levels` noise levels share.

Differs from the paper: samples are drawn in training, where the authors make 50,000 before;
features are the teacher's own, and not those of a separate classifier; the heads are a critic's.
The authors' code has no penalty; `r1` and `r2` make the critic smoother, and ℓ smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from distill.field_types import PositiveInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.games import Adversary
from distill.objectives.noise_levels import LogUniform
from students.critic import Critic
from teachers import conditions
from teachers.solver import solve


@dataclass(kw_only=True)
class Discriminator(Adversary):
    """A critic of the teacher's own samples, whose gradient strengthens it: no student is trained.

    Kim et al. 2022 (arXiv:2211.17091).
    """

    critic: Critic
    times: LogUniform = LogUniform(0.05, 20.0)  # σ/α at which data and samples are compared
    levels: PositiveInt = 4  # noise levels that a sample is seen at, each a term of its own
    solver: Literal["heun", "dpmpp_2m", "ddim"] = "heun"  # that draws the teacher's samples
    solver_steps: PositiveInt = 18

    few_step: ClassVar[bool] = False
    trains: ClassVar[str] = "critic"
    # Other games have other optima; with a reach, times of data and samples would change.
    unused: ClassVar[tuple[str, ...]] = ("game", "reach")

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("critic",), self.critic_loss)

    def critic_loss(self, batch: Batch) -> Loss:
        """The logistic loss of data and of as many samples of the teacher, and its penalties."""
        with torch.no_grad():
            x = solve(self.teacher, batch.noise, self.solver_steps, self.solver, batch.cond)
        x, data = torch.cat([x] * self.levels), torch.cat([batch.data] * self.levels)
        cond = conditions.joined(*[batch.cond] * self.levels)
        seen = batch._replace(x=data, cond=cond)
        return Loss(*self.telling(self.critic, self.times, x, cond, seen))
