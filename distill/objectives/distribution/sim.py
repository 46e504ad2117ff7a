"""Score implicit matching: SiD with another distance of the two scores than the square.

SIM, Luo et al. 2024 (arXiv:2410.16794). For a distance d of y = T - F, the difference of the x̂ of
teacher and fake, the loss d′(y)·(F - x) has the gradient of E d(y) with the sampling distribution
held fixed. Gradients flow through d′(y) too: without that, the student's spread would get half of
its gradient. The square gives twice SiD's loss at α = 1; the pseudo-Huber distance √(|y|² + c²) - c
divides each sample by its own |y|, and so needs no ω. Needs no data; a step costs what SiD's does.

Differs from the paper: y is in the units of x̂, so the weight of a noise level is that of SiD and c
means the same at every level. The paper's c and weights are not in its released code, which only
samples; the default c is iCT's (arXiv:2310.14189), 0.00054 √dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.field_types import Positive
from distill.objectives.distribution.sid import ScoreIdentity
from teachers.process import expand


@dataclass(kw_only=True)
class SIM(ScoreIdentity):
    distance: Literal["huber", "square"] = "huber"
    huber_c: Positive | None = (
        None  # in the units of x̂ of a whole sample; None: 0.00054 √dimensions
    )

    def matching(self, x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """d′(y)·(F - x) with y = T - F; the square's is divided by SiD's ω."""
        gap = real - fake
        if self.distance == "square":
            return 2 * gap * (fake - x) / self.normaliser(x, real)
        c = 0.00054 * x[0].numel() ** 0.5 if self.huber_c is None else self.huber_c
        norm = (gap.square().flatten(1).sum(1) + c**2).sqrt()
        return gap * (fake - x) / expand(norm, gap)
