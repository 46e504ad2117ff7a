"""The gradient that moves samples from the fake score's distribution towards the teacher's.

It is the difference of two denoisers at noised samples, divided by the teacher's own error (DMD,
arXiv:2311.18828, as in DMD2's code).

With `guidance_times` it is two terms, as in Decoupled DMD (arXiv:2511.22677), each at noise levels
and with noise of its own: the unguided teacher against the fake score, and what guidance adds. Each
is divided by the unguided error. It takes one more evaluation of the teacher, and `below` draws the
second term's times from those under the student's own time, between 0.02 and 0.98. At equal times
and noise the two terms add up to the one of the guided teacher, but for the divisors. The authors'
code has no ½ in the square, so its gradients are twice these, and divides by 0.1 at least, of data
with a standard deviation of 1 (`error_floor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from distill.field_types import Positive
from distill.objectives.base import Batch, Objective
from distill.objectives.branches import guidance_of, guidance_step, unguided
from distill.objectives.losses import mean_abs
from distill.objectives.noise_levels import Times, Uniform
from students.lora import adapter_of, innermost
from teachers.denoiser import Denoiser, Guided, Network
from teachers.errors import UserError

LEAST, MOST = 0.02, 0.98  # times of the guidance's term with `below`


@dataclass(kw_only=True)
class Matching(Objective):
    fake: Denoiser  # denoises the student's samples
    times: Times = Uniform(0.02, 0.98)  # where teacher and fake are compared
    # Where what guidance adds is compared, if apart; below: under each sample's own student time.
    guidance_times: Times | Literal["below"] | None = None
    error_floor: Positive = 1e-5  # the least error that a gradient is divided by

    def __post_init__(self) -> None:
        if self.guidance_times is not None:
            guidance_of(self.teacher, "guidance_times")

    def gradient(
        self, x: Tensor, ends: Tensor, batch: Batch, guided: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradient (B, ...) of samples x, and the fake score less the teacher; no graph.

        Args:
            ends: The student's time (B,) of the step that gave each sample.
            guided: Whether the teacher is guided, if it ever is.
        """
        t, x_t = self.noised(x, self.times)
        with torch.no_grad():
            real, fake = self.judge(x_t, t, batch, guided), self.fake(x_t, t, batch.cond)
            grad = self.weighted((fake - real) / self.scale(x, real), x_t, t, batch)
            if self.guidance_times is not None and guided:
                grad = grad + self.guidance_gradient(x, ends, batch)
        return torch.nan_to_num(grad), fake - real

    def judge(self, x_t: Tensor, t: Tensor, batch: Batch, guided: bool = True) -> Tensor:
        """The teacher's x̂ that the fake score is compared with: unguided if guidance is apart."""
        if not isinstance(self.teacher, Guided) or (guided and self.guidance_times is None):
            return self.teacher(x_t, t, batch.cond)
        return unguided(self.teacher, x_t, t, batch.cond)

    def guidance_gradient(self, x: Tensor, ends: Tensor, batch: Batch) -> Tensor:
        """What guidance adds to the gradient (B, ...), at times of its own."""
        if self.guidance_times == "below":
            t = (torch.rand(len(x), device=x.device) * ends).clamp(LEAST, MOST)
        else:
            assert self.guidance_times is not None
            t = self.guidance_times.sample(x, self.teacher.process)
        x_t = self.teacher.process.noise(x, t, torch.randn_like(x))
        guide = guidance_of(self.teacher, "guidance_times")
        plain, guided = guidance_step(guide, x_t, t, batch.cond)
        return (plain - guided) / self.scale(x, plain)

    def scale(self, x: Tensor, real: Tensor) -> Tensor:
        """The divisor of each sample's gradient, (B, 1, ..., 1): the (guided) teacher's error."""
        return mean_abs(x - real).clamp(min=self.error_floor)

    def weighted(self, grad: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The student's gradient times each sample's weight: 1 here; f-divergences override it."""
        return grad

    def noised(self, x: Tensor, times: Times) -> tuple[Tensor, Tensor]:
        """Times t (B,), and x (B, ...) noised to them."""
        t = times.sample(x, self.teacher.process)
        return t, self.teacher.process.noise(x, t, torch.randn_like(x))


def check_pull(student: Denoiser, fake: Denoiser) -> None:
    """Refuse networks whose weights cannot be averaged by name.

    Raises:
        UserError: one of them is an adapter. Its change is a product of two factors, and the
            product of averaged factors is not the average. Or their weights mean different things:
            EDM's students of pixels read another time, and none of them has a null class.
    """
    if adapter_of(student) is not None or adapter_of(fake) is not None:
        raise UserError(
            "objective.ida: adapters cannot be averaged by their factors; remove it, or the "
            "adapters section"
        )
    shapes = [{k: p.shape for k, p in n.named_parameters()} for n in (student, fake)]
    networks, t = (innermost(student), innermost(fake)), torch.tensor([0.3, 0.7])
    times = [n.read_time(t) for n in networks if isinstance(n, Network)]
    known = [v for v in times if not isinstance(v, FakeTensor)]  # in a plan they have no values
    if shapes[0] != shapes[1] or not all(torch.equal(known[0], v) for v in known[1:]):
        raise UserError(
            "objective.ida: this teacher's students in their stock form read other times or labels "
            "than its fake score, so their weights cannot be averaged; remove it"
        )


@torch.no_grad()
def pull(fake: Denoiser, student: Denoiser, kept: float) -> None:
    """Move the fake's weights to the student's, in place: φ ← kept φ + (1 - kept) θ."""
    theirs = dict(student.named_parameters())
    for name, weight in fake.named_parameters():
        weight.lerp_(theirs[name].to(weight.dtype), 1 - kept)
