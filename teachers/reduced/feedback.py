"""A UNet that carries its inner levels on from call to call: DeepCache (arXiv:2312.00858) with the
feedback block of ILF (arXiv:2501.13107).

It keeps the output of its inner levels from one call to the next ones, each of which carries it on
to its own time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import gcd
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from teachers.reduced.network import INTERVAL, WIDTH, ReducedUNet2DConditionModel
from teachers.reduced.one_pass import standing_in


def same(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a block that returns its input."""
    return hidden_states


def same_and_skips(block: Any) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """The forward of a down block that returns its input, also as skip connections no one reads."""
    count = len(block.resnets) + len(block.downsamplers or ())

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states, (hidden_states,) * count

    return forward


def inner_blocks(unet: Any) -> tuple[dict[str, Callable[..., Any]], str]:
    """The blocks of a UNet inside its outermost level, by name: all but the last, each with its
    `forward` where they do not run, and the last one, whose output the outermost level reads."""
    down, up = unet.down_blocks, unet.up_blocks
    stand_ins: dict[str, Callable[..., Any]] = {}
    samplers = range(len(down[0].downsamplers or ()))
    stand_ins |= {f"down_blocks.0.downsamplers.{i}": same for i in samplers}
    stand_ins |= {f"down_blocks.{i}": same_and_skips(down[i]) for i in range(1, len(down))}
    if unet.mid_block is not None:
        stand_ins["mid_block"] = same
    stand_ins |= {f"up_blocks.{i}": same for i in range(len(up) - 2)}
    return stand_ins, f"up_blocks.{len(up) - 2}"


class Feedback(nn.Module):
    """h + s B(h, t): what the inner levels gave at one call, carried on to the time of the next.

    B is a residual block of the UNet's own form and of fewer channels, and s starts at 0.

    Args:
        unet: Whose inner levels they are.
        width: Channels of B; its last layer leads back to h's.
    """

    def __init__(self, unet: Any, width: int) -> None:
        super().__init__()
        like = unet.up_blocks[-2].resnets[-1]
        groups = like.norm1.num_groups
        self.block = ResnetBlock2D(
            in_channels=like.out_channels, out_channels=width, groups=groups,
            groups_out=gcd(groups, width), temb_channels=like.time_emb_proj.in_features,
            eps=like.norm1.eps, time_embedding_norm=like.time_embedding_norm,
        )  # fmt: skip
        self.out = nn.Conv2d(width, like.out_channels, 1)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        """h (B, C, ...) at the time whose embedding temb (B, D) is."""
        to = self.scale.dtype
        change = self.scale * self.out(self.block(h.to(to), temb.to(to)))
        return h + change.to(h.dtype)


class FeedbackUNet2DConditionModel(ReducedUNet2DConditionModel):
    """A UNet2DConditionModel whose inner levels run at every `feedback_interval`-th call of a
    chain; a chain begins where the time does not fall, or the sample has another shape."""

    def complete(self) -> None:
        self.feedback = Feedback(self, self.config[WIDTH])
        self.calls, self.before, self.kept = 0, (float("-inf"), torch.Size()), None

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """A stock UNet's output for sample (B, C, ...)."""
        now = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        if now >= self.before[0] or sample.shape != self.before[1]:
            self.calls = 0
        self.before, whole = (now, sample.shape), self.calls % self.config[INTERVAL] == 0
        self.calls += 1
        stand_ins, last = inner_blocks(self)
        with ExitStack() as stack:
            if whole:
                hook = self.get_submodule(last).register_forward_hook(self.keep)
                stack.callback(hook.remove)
            else:
                for name, forward in {**stand_ins, last: self.carry}.items():
                    stack.enter_context(standing_in(self.get_submodule(name), forward))
            return super().forward(sample, timestep, *args, **kwargs)

    def keep(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.kept = output

    def carry(self, *_: Any, temb: Tensor, **__: Any) -> Tensor:
        self.kept = self.feedback(self.kept, temb)
        return self.kept
