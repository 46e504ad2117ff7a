"""Distribution matching: move the student's samples along the difference of two scores.

DMD2, Yin et al. 2024 (arXiv:2405.14867). The difference of two denoisers, the teacher and one that
tracks the student (the fake score), is the gradient of KL(student ‖ teacher) weighted by σ²/α². A
critic on the fake score's features, trained with real data, corrects the teacher's errors.

As in the authors' code: the fake score learns on every step, the student on every k-th; the fake is
never guided; fakes and data are noised for the critic at independent times over the full range.
Differs from it: with a student of several steps, the fake and the critic see the last x̂ only
(`fake_sees`), and one batch holds samples of every step of the chain.

Later work, each off by default: `guidance_times` compares the guidance at noise levels of its own
(Decoupled DMD, arXiv:2511.22677); `first_step` trains the first step on the teacher's path alone
(DP-DMD, arXiv:2602.03139); `ida` pulls the fake to the student (SenseFlow, arXiv:2506.00523);
`schedule` has random chains, and `alignment` matches beside them too (CDM, arXiv:2605.06376);
`split` divides matching and critic among the steps (Flash-DMD, arXiv:2511.20549).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative, PositiveInt
from distill.objectives.base import Batch, Loss, Turn
from distill.objectives.dmd2_options.alignment import Alignment
from distill.objectives.dmd2_options.first_step import check_part, first_step_loss
from distill.objectives.dmd2_options.limits import check_options
from distill.objectives.dmd2_options.matching import Matching, pull
from distill.objectives.dmd2_options.random_chains import RandomChains, sample_chain
from distill.objectives.dmd2_options.split import low_noise, rows
from distill.objectives.games import Adversary
from distill.objectives.losses import surrogate
from distill.objectives.noise_levels import Times, Uniform
from students.critic import Critic
from students.generator import ChainSamples, Generator
from teachers.denoiser import Cond

Samples = tuple[Tensor, Cond]  # x̂ of the student (B, ...), and its condition


@dataclass(kw_only=True)
class DMD2(Matching, Adversary):
    critic: Critic | None = None  # tells the student's samples from data
    student_every: PositiveInt = 5  # steps, each with a fake update, per student update
    gan_weight: NonNegative = 3e-3  # weight of the critic in the student's loss
    critic_weight: NonNegative = 1e-2  # weight of the critic's own loss beside the fake's
    # Which x̂ of a chain the fake and the critic learn from: the last, which is what users see, or
    # those of every step, as in the authors' code. There one step's errors bias the others the
    # opposite way: a step of too little variety makes the others produce too much.
    fake_sees: ChainSamples = "last"
    gradient_steps: PositiveInt = 1  # of a chain, the last ones, that gradients flow through
    split: Fraction | None = None  # match steps from this time up; below it, the critic alone
    share_samples: bool = False  # fake and critic learn from the samples of the student's turn
    fake_times: Times = Uniform(0.0, 1.0)  # where the fake learns
    critic_times: Times = Uniform(0.0, 1.0)  # where the critic compares
    first_step: NonNegative = 0.0  # weight of the teacher's path, which a first step then learns
    first_step_path: tuple[PositiveInt, PositiveInt] = (5, 30)  # the path's steps, of a grid of
    ida: Fraction | None = None  # share of the fake's weights kept when it is pulled to the student
    schedule: RandomChains | None = None  # chains of random length and times, in training alone
    alignment: Alignment | None = None  # matching beside the chains

    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "critic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)

    @property
    def longest(self) -> int:
        """The steps of the longest chain."""
        return self.schedule.longest if self.schedule else max(self.student.counts)

    def check_batch(self, shape: tuple[int, ...]) -> None:
        if self.first_step or self.split is not None:
            check_part(shape[0], self.longest)

    def turns(self, step: int) -> Iterator[Turn]:
        student, first = sample_chain(self.student, self.schedule)
        shared: list[Samples] | None = [] if self.share_samples else None  # one for each shard
        if step % self.student_every == 0:
            loss = partial(self.student_loss, student=student, first=first, shared=shared)
            yield Turn(("student",), loss)
            if self.ida is not None:
                pull(self.fake, self.student.denoiser, self.ida)
        loss = partial(self.fake_and_critic_loss, student=student, first=first, shared=shared)
        yield Turn(("fake",) if self.critic is None else ("fake", "critic"), loss)
        self.settle(self.critic)

    def student_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """Distribution matching, and the generator loss if there is a critic."""
        x_t = student.inputs(batch.noise, batch.cond, first, self.gradient_steps)
        ends = student.ends(batch.noise, first)
        x = student.denoiser(x_t, ends, batch.cond, torch.zeros_like(ends))
        if shared is not None:
            shared.append((x.detach(), batch.cond))
        loss = self.of_chain(x, ends, batch, student, first)
        beside = self.alignment
        return beside.added(loss, self, student, (x_t.detach(), ends), x, batch) if beside else loss

    def of_chain(
        self, x: Tensor, ends: Tensor, batch: Batch, student: Generator, first: int
    ) -> Loss:
        """The loss of a chain's samples; those of its first step may have one of their own."""
        low = low_noise(student, len(x), first, self.split)
        if not self.first_step:
            return self.matched(x, ends, batch, low)
        path, later = first_step_loss(self.teacher, student, x, batch, first, self.first_step_path)
        n = len(later.noise)
        loss = self.matched(x[:n], ends[:n], later, low)
        return Loss(loss.value + self.first_step * path, {**loss.logs, "first_step": path}, x)

    def matched(self, x: Tensor, ends: Tensor, batch: Batch, low: int | None = None) -> Loss:
        """The loss of samples x (B, ...), given by steps at the student's times `ends` (B,).

        Args:
            low: How many of them learn from the critic alone, and the others by matching alone.
        """
        high, shown = slice(low or 0, None), slice(low)
        grad, gap = self.gradient(x[high], ends[high], rows(batch, high))
        matching = surrogate(x[high], grad)
        logs = {"matching": matching, "gap": gap.abs().mean()}
        if self.critic is None or not self.gan_weight:
            return Loss(matching, logs, x)
        gan = self.fooling(self.critic, self.critic_times, x[shown], rows(batch, shown))
        logs["gan"] = gan
        return Loss(matching + self.gan_weight * gan, logs, x)

    def fake_and_critic_loss(
        self, batch: Batch, student: Generator, first: int = 0, shared: list[Samples] | None = None
    ) -> Loss:
        """The fake's denoising loss on the student's samples; the critic's on them and on data."""
        if shared:
            x, cond = shared.pop(0)
        else:
            x, cond = student.samples(batch.noise, batch.cond, self.fake_sees, first), batch.cond
        denoising = self.fake.loss(x, self.fake_times.sample(x, self.fake.process), cond)
        if self.critic is None:
            return Loss(denoising)
        critic, logs = self.telling(self.critic, self.critic_times, x, cond, batch)
        return Loss(denoising + self.critic_weight * critic, {"denoising": denoising, **logs})
