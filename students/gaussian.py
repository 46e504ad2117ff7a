"""Linear students of closed-form Gaussian teachers: exact enough to race objectives in seconds.

A Gaussian is a linear map of noise, so one step of a linear student can be perfect, and how far it
is from that has a closed form. There is nothing to export: no pipeline draws vectors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.denoiser import Cond, Denoiser
from teachers.process import Process
from teachers.storage.files import save_tensors
from teachers.teacher import Teacher


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


def exact(teacher: Teacher) -> bool:
    """Whether its students are linear ones."""
    return isinstance(teacher.denoiser, Gaussian)


def student(teacher: Teacher) -> Generator:
    """A one-step student, far from the teacher's law: the standard normal at half its width, at 1.

    Others start as their teacher; a linear one would have nothing left to learn.
    """
    return Generator(Affine(*_start(teacher), teacher.denoiser.process))


def score(teacher: Teacher) -> Score:
    """A fake score that starts at the student's own law."""
    return Score(*_start(teacher), teacher.denoiser.process)


def save(generator: Generator, folder: Path) -> None:
    """Leave m and R in `folder`, where other students leave a pipeline."""
    folder.mkdir(exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in generator.denoiser.state_dict().items()}
    save_tensors(state, folder / "affine.safetensors")


def _start(teacher: Teacher) -> tuple[Tensor, Tensor]:
    (d,) = teacher.shape
    return torch.ones(d), 0.5 * torch.eye(d)
