"""Compression: a smaller network learns its teacher's output and features at every noise level.

BK-SDM, Kim et al. 2023 (arXiv:2305.15798): the sum of three terms, the denoising loss on data
(`task`), the distance to the teacher's output (`output`) and those of features (`features`), each
in the network's own units. KOALA (arXiv:2312.04005) compares the outputs of self-attentions
(`taps: [self-attention]`), LAPTOP-Diff (arXiv:2404.11098) divides each by the teacher's size
(`scale: norm`), TinyFusion (arXiv:2412.01199) leaves out what is far from the mean (`masked`).

It trains at all times, so that the student of `student: {steps: K, renoise: false}` is a model of
many steps: the start of any few-step student (`student.init`). With a guided teacher the output is
the guided one, which then takes one evaluation. Costs a forward of each network, two of a guided
teacher, and one more of that where features are compared, which are those without guidance.

`skip` leaves out layers at random, which prepares a network for losing some: SnapFusion's robust
training (arXiv:2306.00980, section 3.1), whose probability is not stated.

Differs from BK-SDM's code: a share of conditions becomes the null one (`drop`), without which the
unguided half of guidance would learn nothing of its own; and the middle is compared, too, if any.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distill.field_types import Fraction, NonNegative
from distill.objectives.base import Batch, Learns, Loss, Objective
from distill.objectives.losses import mean_square
from distill.objectives.noise_levels import Times, Uniform
from distill.objectives.smaller.taps import BACKBONE, KEY, Scale, feature_loss, taps_of
from students.architecture.units import skipping, units
from students.lora import innermost, network_of
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Cond, Denoiser, Guided
from teachers.errors import UserError
from teachers.features import tapped
from teachers.process import expand


@dataclass(kw_only=True)
class Compression(Objective):
    task: NonNegative = 1.0  # weight of the denoising loss on data
    output: NonNegative = 1.0  # weight of the distance to the teacher's output
    features: NonNegative = 1.0  # weight of the distance of features
    # Which: "blocks", "self-attention", modules that both have, or STUDENT=TEACHER.
    taps: tuple[str, ...] = ("blocks",)
    scale: Scale = "none"  # what a feature's distance is measured in
    times: Times = Uniform(0.0, 1.0)
    skip: Fraction = 0.0  # how often each layer that can go is left out, drawn for each batch
    drop: Fraction = 0.1  # share of conditions that become the null one, of an unguided teacher

    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        if not self.task + self.output + self.features:
            raise UserError("objective: task, output and features are all 0; give one a weight")
        network = self.student.denoiser
        self.pairs = taps_of(self.taps, network, self.plain) if self.features else {}
        self.units = [*units(network_of(network).backbone)] if self.skip else []
        if self.skip and not self.units:
            raise UserError("objective.skip: the student's network has no layers that can go")
        for tap in self.pairs:
            if inside := [u for u in self.units if tap.startswith(f"{BACKBONE}{u}.")]:
                raise UserError(
                    f"objective.skip: {inside[0]} is left out at times, and taps names a module "
                    "in it; name blocks, or set features: 0"
                )

    @property
    def plain(self) -> Denoiser:
        """The teacher without guidance."""
        return innermost(self.teacher)

    @property
    def guides(self) -> bool:
        """Whether the teacher's output is guided."""
        if self.plain is self.teacher:
            return False
        return type(self.teacher) is not Guided or self.teacher.scale != 1

    def loss(self, batch: Batch, step: int) -> Loss:
        network, x, cond = self.student.denoiser, batch.data, self.dropped(batch.cond)
        t = self.times.sample(x, network.process)
        x_t = network.process.noise(x, t, torch.randn_like(x))
        with self.skipping(), tapped(network, [*self.pairs], KEY) as ours:
            out = network(x_t, t, cond)
        weight, logs = network.weight(t), dict[str, Tensor]()
        logs["task"] = (weight * mean_square(out, x)).mean()
        value = self.task * logs["task"]
        if not self.output + self.features:
            return Loss(value, logs)
        guided, theirs = self.guides and self.output > 0, dict[str, Tensor]()
        if self.features or not guided:
            with torch.no_grad(), tapped(self.plain, [*self.pairs.values()], KEY) as theirs:
                target = self.plain(x_t, t, cond)
        if guided:
            with torch.no_grad():
                target = self.teacher(x_t, t, cond)
        logs["output"] = (weight * mean_square(out, target)).mean()
        value = value + self.output * logs["output"]
        if self.features:
            logs["features"] = feature_loss(ours, theirs, self.pairs, self.scale)
            value = value + self.features * logs["features"]
        return Loss(value, {k: v.detach() for k, v in logs.items()})

    def skipping(self) -> AbstractContextManager[None]:
        """Within it, the student runs without a random choice of its layers that can go."""
        if not self.units:
            return nullcontext()
        gone = [name for name in self.units if random.random() < self.skip]
        return skipping(network_of(self.student.denoiser).backbone, gone)

    def dropped(self, cond: Cond) -> Cond:
        """Conditions of which a share is the null one, where an unguided teacher has one."""
        return cond if self.guides else with_null(self.teacher, cond, self.drop)


def with_null(teacher: Denoiser, cond: Cond, share: float) -> Cond:
    """Conditions (B, ...) of which a share is the null one, as guidance has it, if there is one."""
    scale = (cond or {}).get(GUIDANCE_SCALE)
    if cond is None or not isinstance(teacher, Guided) or teacher.null is None or not share:
        return cond
    own = {k: v for k, v in cond.items() if k != GUIDANCE_SCALE}
    empty = teacher.branches(own)[1]
    lost = torch.rand(len(next(iter(own.values()))), device=next(iter(own.values())).device)
    found = {k: torch.where(expand(lost < share, v), empty[k], v) for k, v in own.items()}
    return found if scale is None else {**found, GUIDANCE_SCALE: scale}
