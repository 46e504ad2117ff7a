"""Linear students of closed-form Gaussian teachers: exact enough to race objectives in seconds.

A Gaussian is a linear map of noise, so one step of a linear student can be exact, and its Fréchet
distance from the teacher has a closed form. No pipeline samples vectors: the export is m and R.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from students.form import Normal, StudentForm, StudentRequest
from students.generator import Generator, Renoise
from students.lora import Adapter
from teachers.analytic import Gaussian
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError
from teachers.process import Process
from teachers.storage.files import save_tensors


class Affine(Denoiser):
    """A student whose step from noise z maps it to m + R z; x_t is (B, D).

    Args:
        mean: m, (D,).
        root: R, (D, D).
    """

    def __init__(self, mean: Tensor, root: Tensor, process: Process) -> None:
        super().__init__()
        self.process = process
        self.mean, self.root = nn.Parameter(mean.clone()), nn.Parameter(root.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        return self.mean + x_t / self.process.at(t, x_t)[1] @ self.root.T

    @property
    def cov(self) -> Tensor:
        """R Rᵀ, (D, D)."""
        return self.root @ self.root.T


class Score(Affine):
    """A fake score that can be exact: the denoiser of N(m, R Rᵀ) with m and R to be learned."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.at(t, x_t)  # (B, 1)
        unit = torch.eye(len(self.mean), dtype=x_t.dtype, device=x_t.device)
        noise = sigma[..., None] ** 2 * unit
        total = alpha[..., None] ** 2 * self.cov + noise  # (B, D, D), of x_t
        inner = torch.linalg.solve(total, (x_t - alpha * self.mean)[..., None])
        return self.mean + alpha * (self.cov @ inner)[..., 0]

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class GaussianForm(StudentForm):
    """Linear one-step students; a fake score of theirs can be exact."""

    def check(self, request: StudentRequest) -> None:
        where = f"teacher {self.teacher.source!r}"
        if "fake" not in request.networks:
            raise UserError(
                f"{where}: objective.name: {request.objective} trains at many times, but a "
                "linear student has one; use an objective with a fake score, such as dmd2 or sid"
            )
        for section in request.sections:
            raise UserError(f"{where}: {section}: its students are linear; remove the section")
        if request.steps != 1:
            raise UserError(f"{where}: student.steps: its students take 1 step; set it to 1")
        if request.sample_every:
            raise UserError(f"{where}: train.sample_every: it has no pictures to show; set it to 0")

    def student(
        self, steps: int, start: float | None, renoise: Renoise, adapter: Adapter | None
    ) -> Generator:
        """A one-step student far from the teacher's distribution: N(1, ¼), independently per
        dimension.

        Other students start as their teacher; a linear one would have nothing left to learn.
        """
        return Generator(Affine(*self._start(), self.teacher.denoiser.process))

    def network(self) -> Score:
        """A fake score that starts at the student's own distribution."""
        return Score(*self._start(), self.teacher.denoiser.process)

    def export(self, student: Generator, folder: Path, recipe: Mapping[str, Any]) -> Generator:
        """Write m and R to `folder`, where other students leave a pipeline."""
        folder.mkdir(exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in student.denoiser.state_dict().items()}
        save_tensors(state, folder / "affine.safetensors")
        return student

    @torch.no_grad()
    def distributions(self, student: Generator) -> tuple[Normal, Normal]:
        teacher, affine = self.teacher.denoiser, student.denoiser
        assert isinstance(teacher, Gaussian) and isinstance(affine, Affine)
        cov = teacher.vectors * teacher.values @ teacher.vectors.T
        return Normal(affine.mean, affine.cov), Normal(teacher.mean, cov)

    def _start(self) -> tuple[Tensor, Tensor]:
        """m and R before training."""
        (d,) = self.teacher.shape
        return torch.ones(d), 0.5 * torch.eye(d)
