"""DSNO: states of the teacher's trajectory from its noise, all of them in one pass.

Zheng et al. 2022 (arXiv:2211.13449; code: devzhk/DSNO-pytorch). The student's network has T outputs
(`student.architecture`, `network: dsno`), and pairs hold the states at T times (`data.states`):

    L = mean over T of max(1, min(α/σ, 10⁴)) · d(output, state / √(α² + σ²)).

The last state is the sample. One network call of T samples for each pair, and none of the
teacher.

Differs from the paper: d is L1 and not LPIPS of VGG unless `distance` says so. The paper's process
keeps variance, where √(α² + σ²) is 1; others are scaled to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from distill.objectives.base import Batch, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.pairs.outputs import check_outputs, several_outputs
from distill.objectives.pairs.regression import Distance, check_lpips, distances
from teachers.errors import UserError
from teachers.solver import quadratic_times

MOST = 1e4  # of a weight


@dataclass(kw_only=True)
class DSNO(Objective):
    distance: Distance = "absolute"  # of an output to its state; square, huber or lpips

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "pairs"
    needs_states: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_outputs(self.student.denoiser, "student.architecture.network")

    def check_batch(self, shape: tuple[int, ...]) -> None:
        if self.distance == "lpips":
            check_lpips(shape)

    def loss(self, batch: Batch, step: int) -> Loss:
        z, path = batch.noise, batch.path
        assert path is not None
        t = z.new_full((len(z),), self.student.times[0])
        x_t = self.student.scale(z) * z
        with several_outputs(self.student.denoiser, x_t, t) as kept:
            x = self.student.denoiser(x_t, t, batch.cond, torch.zeros_like(t))
        outputs, process = kept(), self.student.denoiser.process
        if len(outputs) != path.shape[1]:
            raise UserError(
                f"data.states: {path.shape[1]}, and the student's network has {len(outputs)} "
                "outputs; give as many"
            )
        values = []
        for k, time in enumerate(quadratic_times(len(outputs))):
            alpha, sigma = process.scales(torch.tensor(time, dtype=torch.float64))
            weight = (alpha / sigma).clamp(1, MOST).item()
            target = path[:, k] / torch.hypot(alpha, sigma).item()
            values.append(weight * distances(outputs[k], target, self.distance).mean())
        logs = {"error": mean_square(x, batch.data).detach().mean()}
        return Loss(torch.stack(values).mean(), logs, x)
