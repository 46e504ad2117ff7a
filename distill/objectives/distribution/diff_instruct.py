"""Diff-Instruct, VSD and SwiftBrush: the student follows the difference of two scores.

Diff-Instruct is Luo et al. 2023 (arXiv:2305.18455), VSD Wang et al. 2023 (arXiv:2305.16213), and
SwiftBrush Nguyen and Tran 2023 (arXiv:2312.05239). The gradient is that of ∫ w(t) KL(student ‖
teacher) dt over noise levels, not normalised for each sample as DMD's is. With the teacher T and
the fake score F, which tracks the student, KL's own gradient is α (s_F - s_T) = (α/σ)² (F - T):

| weighting | gradient of x̂ | w(t) | of |
|---|---|---|---|
| `denoiser` | F - T | (σ/α)² | Diff-Instruct, on EDM |
| `noise` | σ² (ε_T - ε_F) = ασ (F - T) | σ³/α | VSD, SwiftBrush |
| `kl` | (α/σ)² (F - T) | 1 | the plain integral; it grows without bound near data |

Needs no data. Both networks are guided alike with `guide_fake`, as SwiftBrush's code does; the fake
score then learns without its condition for a share of samples. A step with a turn of the student
costs 2 forwards of the student, 1 of the teacher and 2 of the fake; 2 and 3 where both are guided.

Differs from the authors' code: there is no dropout, so none has to be drawn alike; Diff-Instruct
sums over dimensions, which is `reduction: sum`; SwiftBrush's first time and α are its student's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import PositiveInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.branches import GuidedFake
from distill.objectives.losses import mean_square, surrogate
from distill.objectives.noise_levels import LogNormal, Times
from students.generator import ChainSamples, Generator


@dataclass(kw_only=True)
class DiffInstruct(GuidedFake):
    weighting: Literal["denoiser", "noise", "kl"] = "denoiser"  # of noise levels: see above
    reduction: Literal["sum", "mean"] = "sum"  # of the student's loss over dimensions
    student_every: PositiveInt = 1  # steps, each with a fake update, per student update
    # The fake's own loss, or that times α²: SwiftBrush's, whose networks predict noise.
    fake_weighting: Literal["own", "alpha2"] = "own"
    fake_sees: ChainSamples = "last"  # which of a chain's x̂ the fake learns from
    times: Times = LogNormal(-1.2, 1.2)  # where teacher and fake are compared
    fake_times: Times = LogNormal(-1.2, 1.2)  # where the fake learns

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "never"

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = self.student.sample_chain()
        yield Turn(("fake",), partial(self.fake_loss, student=student, first=first))
        if step % self.student_every == 0:
            yield Turn(("student",), partial(self.student_loss, student=student, first=first))

    def student_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """A loss whose gradient of x̂ is the weighted difference, over B or over all elements."""
        x = student.rollout(batch.noise, batch.cond, first)
        t = self.times.sample(x, self.teacher.process)
        x_t = self.teacher.process.noise(x, t, torch.randn_like(x))
        with torch.no_grad():
            real, fake = self.teacher(x_t, t, batch.cond), self.fake_x(x_t, t, batch.cond)
            grad = self.level_weight(t, x) * (fake - real)
        matching = surrogate(x, torch.nan_to_num(grad))
        size = x[0].numel() if self.reduction == "sum" else 1
        return Loss(size * matching, {"matching": matching, "gap": (fake - real).abs().mean()}, x)

    def level_weight(self, t: Tensor, x: Tensor) -> Tensor:
        """The factor of F - T at times t (B,), shaped (B, 1, ..., 1)."""
        alpha, sigma = self.teacher.process.at(t, x)
        if self.weighting == "noise":
            return alpha * sigma
        return (alpha / sigma).square() if self.weighting == "kl" else torch.ones_like(alpha)

    def fake_loss(self, batch: Batch, student: Generator, first: int = 0) -> Loss:
        """The fake's denoising of the student's samples."""
        x = student.samples(batch.noise, batch.cond, self.fake_sees, first)
        cond, process = self.shown_to_fake(x, batch.cond), self.fake.process
        t = self.fake_times.sample(x, process)
        if self.fake_weighting == "own":
            return Loss(self.fake.loss(x, t, cond))
        error = mean_square(self.fake(process.noise(x, t, torch.randn_like(x)), t, cond), x)
        return Loss((process.scales(t)[0].square() * self.fake.weight(t) * error).mean())
