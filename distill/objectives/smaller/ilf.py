"""Inner loop feedback: what a UNet's inner levels gave in one step is carried on to the next ones.

Gwilliam et al. 2025 (arXiv:2501.13107), in the form of a UNet. DeepCache (arXiv:2312.00858) keeps
the output of the inner levels for the next `interval` - 1 steps of a sampler. Here it passes
through a small residual block in each of them, which reads their time: h + s B(h, t), s = 0 at
first, and then it is DeepCache. The network is frozen; the block learns.

From data under noise at every `interval`-th of the sampler's `steps` times, the teacher makes the
steps that it makes as it samples; in those that run the outermost level alone, the error of x̂
against the whole network's at the same sample, as the network's own loss weights it, is the loss.
Costs 1 forward of the teacher, and for each of the interval - 1 steps 1 more and 1 of its outermost
level with gradients.

`distill teach` trains it and leaves a pipeline with it inside (`distill/pretrain/feedback.py`).

Differs from the paper: it is of transformers, one of whose blocks B is a copy of; its target is the
teacher's output at half the time, and its schedule is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill.field_types import PositiveInt
from distill.objectives.base import Auxiliary, Batch, Learns, Loss, Objective, Turn
from distill.objectives.losses import mean_square
from students.lora import unwrap
from teachers.errors import UserError
from teachers.reduced.deepcache import DeepCache, deep_part
from teachers.reduced.feedback import Feedback
from teachers.teacher import Teacher


class FeedbackBlock(Auxiliary):
    """The block that carries a UNet's inner levels on, which `shape` makes.

    Attributes:
        unet: The teacher's, in a tuple: it is no part of this one.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        if not isinstance(unet, UNet2DConditionModel):
            raise UserError(
                f"objective.name: ilf needs a UNet2DConditionModel of diffusers, and this teacher "
                f"has a {type(unet).__name__}; name another objective"
            )
        try:
            deep_part(unet)
        except UserError as error:
            raise UserError(f"objective.name: ilf on this teacher: {error}") from None
        self.unet, self.carry = (unet,), None

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        return cls(unwrap(teacher.denoiser).backbone)

    def shape(self, width: int, device: torch.device) -> None:
        self.carry = Feedback(self.unet[0], width).to(device)


@dataclass(kw_only=True)
class InnerLoopFeedback(Objective):
    feedback: FeedbackBlock
    steps: PositiveInt = 10  # of the sampler, whose times are the process's own
    interval: Annotated[PositiveInt, Ge(2)] = 2  # steps from one of the whole network to the next
    width: PositiveInt = 24  # channels of the block

    few_step: ClassVar[bool] = False
    trains: ClassVar[str] = "feedback"
    learns: ClassVar[Learns] = "all-times"

    def __post_init__(self) -> None:
        if self.steps % self.interval:
            raise UserError(
                f"objective.interval: {self.interval} does not divide the {self.steps} steps; "
                "give a count that does"
            )
        self.feedback.shape(self.width, next(self.teacher.parameters()).device)

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn(("feedback",), self.carried_loss)

    def carried_loss(self, batch: Batch) -> Loss:
        """The error of x̂ in the steps between those of the whole network."""
        x, count = batch.data, self.steps // self.interval
        places = self.interval * torch.randint(count, (len(x),), device=x.device)
        value = x.new_zeros(())
        for x_t, t, found in self.carried(batch, places):
            with torch.no_grad():
                whole = self.teacher(x_t, t, batch.cond)
            error = self.teacher.weight(t) * mean_square(found, whole)
            value = value + error.mean() / (self.interval - 1)
        scale: Any = self.feedback.carry
        return Loss(value, {"error": value.detach(), "scale": scale.scale.detach()})

    def carried(self, batch: Batch, places: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """x_t (B, ...), t (B,) and x̂ (B, ...) with its graph, in each of the steps between.

        Args:
            places: In the sampler, of the whole network's step; (B,).
        """
        process, passes = self.teacher.process, list[tuple[Tensor, Tensor, Tensor]]()
        times = process.grid(self.steps).to(batch.noise)
        t = times[places]
        x_t = process.noise(batch.data, t, batch.noise)
        with DeepCache(self.feedback.unet[0], self.interval, self.feedback.carry):
            with torch.no_grad():
                x = self.teacher(x_t, t, batch.cond)
            for k in range(1, self.interval):
                s = times[places + k]
                x_t, t = process.step(x_t, x.detach(), t, s), s
                x = self.teacher(x_t, t, batch.cond)
                passes.append((x_t, t, x))
        return passes
