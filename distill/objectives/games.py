"""What objectives with a critic share: the game, the critic's penalties, and SAN's two losses.

The games are in `losses`. R1 and R2 (Mescheder et al. 2018, arXiv:1801.04406) are γ/2 E|∇ℓ|² of the
logit ℓ at noised data and at noised samples. `exact` differentiates ℓ with respect to the noised
input, so that the penalty's own gradient is a second derivative: it runs attention by its formula,
in float32 and without compiled code. `features` differentiates with respect to what the heads read,
as ADD does (arXiv:2311.17042), which needs no second pass of the network. `approximate` is a
difference: γ/2 (ℓ(x_t + δ n) - ℓ(x_t))² / δ² with unit noise n, both at t (Seaweed-APT,
arXiv:2501.08316, whose λ is γ/2δ²). It tends to `exact` as δ does to 0, and takes one pass more.

With `reach` the noise that a critic sees follows it, as in Diffusion-GAN (Wang et al. 2022,
arXiv:2206.02262): where it tells data too surely, it gets more. Differs from its code: times are
those of `critic_times`, shortened, and not a table of indices; the reach moves in every step.

A SAN critic (Takida et al. 2023, arXiv:2301.12811) minimises the game's loss by its features and a
Wasserstein loss by the directions of its last layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass as config
from torch import Tensor

from distill.field_types import Fraction, NonNegative, Positive, PositiveInt
from distill.objectives.base import Batch, Objective
from distill.objectives.losses import Game, all_sum, critic_loss, generator_loss
from distill.objectives.noise_levels import Times
from distill.objectives.tangent import exactly
from students.critic import Critic, SANCritic
from teachers import conditions
from teachers.denoiser import Cond

Penalty = Literal["exact", "features", "approximate"]


class Shown(NamedTuple):
    """What a critic reads: x_t (B, ...) at times t (B,), and conditions."""

    x_t: Tensor
    t: Tensor
    cond: Cond


class Verdict(NamedTuple):
    """Logits (B,), their slope's square (B,) and SAN's logits (B,) for the directions.

    slope: |∇ℓ|², or its estimate; None where there is no penalty.
    direction: None where the critic is no SAN critic.
    """

    logits: Tensor
    slope: Tensor | None = None
    direction: Tensor | None = None


@config(frozen=True, config={"extra": "forbid"})
class Reach:
    """How far the critic's times go: a share of `critic_times`, which moves by 1/steps of its range
    in each step, up where the mean sign of the logits of data is above `target`, else down.

    low, high: The least share, where it begins, and the largest.
    clean: The share of samples and data that have no noise at all.
    """

    target: Fraction = 0.6
    low: Fraction = 0.01
    high: Fraction = 1.0
    steps: PositiveInt = 1000
    clean: Fraction = 0.5

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low, {self.low}, is above high, {self.high}; lower it")

    def shortened(self, t: Tensor, now: Tensor) -> Tensor:
        """Times t (B,) times the present share (), or 0."""
        return torch.where(torch.rand_like(t) < self.clean, torch.zeros_like(t), now.to(t) * t)

    def moved(self, now: Tensor, heard: Tensor) -> Tensor:
        """The share () after a step, by the sum of the signs of data's logits and their number."""
        step = (self.high - self.low) / self.steps
        return (now + step * (heard[0] / heard[1] - self.target).sign()).clamp(self.low, self.high)


@dataclass(kw_only=True)
class Adversary(Objective):
    # relativistic compares samples and data of equal index, under equal conditions and times.
    game: Game = "logistic"
    r1: NonNegative = 0.0  # γ of the penalty at data
    r2: NonNegative = 0.0  # γ of the penalty at the student's samples
    penalty: Penalty = "exact"
    penalty_step: Positive = 0.01  # approximate: δ, in units of x_t
    same_noise: bool = False  # samples and data of equal index have one time and one noise
    reach: Reach | None = None  # the critic's times follow how surely it tells data
    reached: Tensor | None = field(default=None, init=False)  # the present share, ()
    heard: Tensor | None = field(default=None, init=False)  # in this step, (2,): see `Reach.moved`

    def fooling(self, critic: Critic, times: Times, x: Tensor, batch: Batch) -> Tensor:
        """The student's loss () of samples x (B, ...) for the first of the batch's conditions."""
        (t, noise), cond = self.drawn_for_critic(x, times), batch.cond
        real = None
        if self.game == "relativistic":
            cond = conditions.rows(cond, slice(len(x)))
            with torch.no_grad():
                real = critic(*self.shown(batch.data[: len(x)], cond, t, torch.randn_like(x)))
        return generator_loss(critic(*self.shown(x, cond, t, noise)), self.game, real)

    def telling(
        self, critic: Critic, times: Times, x: Tensor, cond: Cond, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss () of samples x (B, ...) under conditions and of data; scalars to log.

        Without penalties it is one call of the critic for both.
        """
        t, noise = self.drawn_for_critic(x, times)
        fake = self.shown(x, cond, t, noise)
        if self.same_noise:
            s, other = t, noise
        elif self.game == "relativistic":
            s, other = t, torch.randn_like(batch.data)
        else:
            s, other = self.drawn_for_critic(batch.data, times)
        return self.compared(critic, fake, self.shown(batch.data, batch.cond, s, other))

    def compared(
        self, critic: Critic, fake: Shown, real: Shown, penalised: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss () of what it reads of samples and of data; scalars to log.

        Args:
            penalised: With the penalties that have a weight.
        """
        if penalised and (self.r1 or self.r2):
            f, r = self.judged(critic, fake, self.r2), self.judged(critic, real, self.r1)
        else:
            joined = conditions.joined(fake.cond, real.cond)
            times = torch.cat([fake.t, real.t])
            both = Shown(torch.cat([fake.x_t, real.x_t]), times, joined)
            f, r = halves(self.judged(critic, both))
        if self.reach is not None:
            self.hear(r.logits.detach())
        game = critic_loss(f.logits, r.logits, self.game)
        value, logs = game, {"critic": game, "accuracy": accuracy(f.logits, r.logits, self.game)}
        if f.direction is not None and r.direction is not None:
            value = value + f.direction.mean() - r.direction.mean()
        for name, gamma, verdict in (("r1", self.r1, r), ("r2", self.r2, f)):
            if verdict.slope is not None:
                logs[name] = verdict.slope.mean()
                value = value + gamma / 2 * logs[name]
        return value, logs

    def drawn(self, x: Tensor, times: Times) -> tuple[Tensor, Tensor]:
        """Times (B,) and unit noise (B, ...) for x (B, ...)."""
        return times.sample(x, self.teacher.process), torch.randn_like(x)

    def drawn_for_critic(self, x: Tensor, times: Times) -> tuple[Tensor, Tensor]:
        """Times (B,) within the reach, and unit noise (B, ...), for what a critic reads."""
        t, noise = self.drawn(x, times)
        return (t if self.reach is None else self.reach.shortened(t, self.share(x))), noise

    def share(self, like: Tensor) -> Tensor:
        """The present share (), on the device of `like`."""
        assert self.reach is not None
        if self.reached is None:
            self.reached = torch.full((), self.reach.low, device=like.device)
        return self.reached

    def hear(self, logits: Tensor) -> None:
        """Take the signs of data's logits (B,) into this step's sum."""
        signs = logits.float().sign()
        heard = torch.stack([signs.sum(), torch.ones_like(signs).sum()])
        self.heard = heard if self.heard is None else self.heard + heard

    def settle(self, critic: Critic | None) -> None:
        """After the critic's turn: a SAN critic's unit vectors, and the reach by what was heard."""
        renormalise(critic)
        if self.reach is not None and self.heard is not None:
            self.reached = self.reach.moved(self.share(self.heard), all_sum(self.heard))
            self.heard = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.reached is None else {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.reach is not None and "reached" in state:
            device = next(self.student.parameters()).device
            self.reached = state["reached"].to(device)

    def shown(self, x: Tensor, cond: Cond, t: Tensor, noise: Tensor) -> Shown:
        """x (B, ...) noised to t (B,)."""
        return Shown(self.teacher.process.noise(x, t, noise), t, cond)

    def judged(self, critic: Critic, shown: Shown, gamma: float = 0.0) -> Verdict:
        """What the critic says, with the slope of its logits if their penalty has a weight."""
        if not gamma:
            return verdict(critic, shown)
        if self.penalty == "features":
            return feature_slope(critic, shown)
        if self.penalty == "exact":
            return exact_slope(critic, shown)
        here = verdict(critic, shown)
        moved = shown.x_t + self.penalty_step * torch.randn_like(shown.x_t)
        there = verdict(critic, shown._replace(x_t=moved))
        return here._replace(slope=((there.logits - here.logits) / self.penalty_step).square())


def verdict(critic: Critic, shown: Shown) -> Verdict:
    """A critic's logits, and a SAN critic's for its directions."""
    if isinstance(critic, SANCritic):
        return of_features(critic, critic.features(*shown))
    return Verdict(critic(*shown))


def of_features(critic: Critic, features: list[Tensor]) -> Verdict:
    """The same of what the heads read."""
    if isinstance(critic, SANCritic):
        logits, direction = critic.apart(features)
        return Verdict(logits, direction=direction)
    return Verdict(critic.read(features))


def exact_slope(critic: Critic, shown: Shown) -> Verdict:
    """With |∇ℓ|² at x_t, summed over dimensions, which itself has a gradient."""
    x_t = shown.x_t.detach().requires_grad_()
    with exactly(x_t.device.type), torch.enable_grad():
        said = verdict(critic, shown._replace(x_t=x_t))
        (slope,) = torch.autograd.grad(said.logits.sum(), x_t, create_graph=True)
    return said._replace(slope=slope.square().flatten(1).sum(1))


def feature_slope(critic: Critic, shown: Shown) -> Verdict:
    """With |∇ℓ|² at the features that the heads read, summed over heads and dimensions."""
    features = critic.features(*shown)
    features = [f if f.requires_grad else f.detach().requires_grad_() for f in features]
    with exactly(shown.x_t.device.type), torch.enable_grad():
        said = of_features(critic, features)
        slopes = torch.autograd.grad(said.logits.sum(), features, create_graph=True)
    square = torch.stack([s.float().square().flatten(1).sum(1) for s in slopes]).sum(0)
    return said._replace(slope=square)


def halves(both: Verdict) -> tuple[Verdict, Verdict]:
    """What was said of samples, and of data, of one call for both."""
    first, second = both.logits.chunk(2)
    if both.direction is None:
        return Verdict(first), Verdict(second)
    fake, real = both.direction.chunk(2)
    return Verdict(first, direction=fake), Verdict(second, direction=real)


def accuracy(fake: Tensor, real: Tensor, game: Game) -> Tensor:
    """How often logits (B,) are on the right side: of 0 or, in the relativistic game, of a pair."""
    if game == "relativistic":
        return (real > fake).float().mean()
    return torch.cat([fake <= 0, real > 0]).float().mean()


def renormalise(critic: Critic | None) -> None:
    """After a step of a SAN critic, make its directions unit vectors again."""
    if isinstance(critic, SANCritic):
        critic.renormalise()
