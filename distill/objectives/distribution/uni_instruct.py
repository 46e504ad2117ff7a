"""f-divergences expanded over the noise levels: SiDA with weights of the density ratio.

Uni-Instruct, Wang et al. 2025 (arXiv:2505.20755). An f-divergence of samples is an integral over
noise levels of h(r)|y|², with h(r) = r² f″(r), r = p_teacher/p_student and y the difference of the
scores. Its gradient is SIM's (SiD's at α = 1) weighted by h(r), and a Diffusion-Instruct term
weighted by -r² h″(r), which is 0 for the KL divergences. With r = 1 and the forward KL it is SiDA.

r is the exponential of the discriminator's logit, averaged over places, at the same x_t. The
authors' code reads the value of a batch's entropy as a probability, which is no density ratio.
Differs from it further: |y| is of each sample, theirs of the whole batch; SiD's and the
discriminator's halves are SiDA's. As there, the second term is |y| y in units of x̂, without ω; our
derivation gives ½ (α/σ)² |y|² y / ω. A step costs what SiDA's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distill.field_types import Positive
from distill.objectives.distribution.fdistill import WEIGHTS, Divergence
from distill.objectives.distribution.sida import SiDA
from teachers.errors import UserError
from teachers.process import expand

# -r² h″(r), for h of f-distill's table.
SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "softened-reverse-kl": lambda r: -2 * r**2 / (1 + r) ** 3,
    "jensen-shannon": lambda r: 2 * r**2 / (1 + r) ** 3,
    "squared-hellinger": lambda r: r.sqrt() / 16,
    "neyman": lambda r: -4 / r,
}


@dataclass(kw_only=True)
class UniInstruct(SiDA):
    divergence: Divergence = "forward-kl"
    ratio_min: Positive = 0.1  # ratios are clamped to these
    ratio_max: Positive = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio_min >= self.ratio_max:
            raise UserError(
                f"objective.ratio_min: {self.ratio_min} is not below ratio_max, {self.ratio_max}; "
                "lower it"
            )

    @property
    def reads_critic(self) -> bool:
        """Always: the ratio needs it, whatever the discriminator's weight is."""
        return True

    def weighted(self, value: Tensor, logits: Tensor, x: Tensor, gap: Tensor) -> Tensor:
        """h(r) of SiD's loss, and the second term, |y| y·x with its weight; r has no gradient."""
        logit = logits.detach().mean(1).clamp(-10, 10)
        ratio = logit.exp().clamp(self.ratio_min, self.ratio_max).to(value.dtype)
        value = expand(WEIGHTS[self.divergence](ratio), value) * value
        if self.divergence not in SECOND:
            return value
        y = gap.detach()
        norm = y.square().flatten(1).sum(1).sqrt()
        return value + expand(SECOND[self.divergence](ratio) * norm, y) * y * x
