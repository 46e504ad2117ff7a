"""UNets of diffusers that do less work than stock ones: without layers, or with one encoder pass.

Stock configs say how many layers a stage has, and not which ones: a UNet that lacks a single
residual block or attention has no stock form. Here each removed layer is replaced by one without
weights that passes its input on, which is what a residual layer of zero does.

A one-pass UNet (TiUE, arXiv:2505.21960) makes a student of N steps one call: its encoder and middle
run once, its decoder at all N times as one batch. The decoder never reads the samples between
the steps, so N steps of DDIM are a weighted sum of its input and its N outputs.

A feedback UNet (ILF, arXiv:2501.13107, as DeepCache, arXiv:2312.00858) keeps the output of its
inner levels from one call to the next ones, each of which carries it on to its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from math import gcd
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

# Keys of a config. The names of the layers that are not there:
REMOVED = "removed_units"
# The N times of the decoder, as the network reads times, from noise to data:
TIMES = "decoder_times"
# In the network's output, the shares of its input and of the N outputs of the decoder:
SHARES = "decoder_shares"
# Calls from one that runs the inner levels to the next, and the width of what carries them on:
INTERVAL = "feedback_interval"
WIDTH = "feedback_width"
OWN = (REMOVED, TIMES, SHARES, INTERVAL, WIDTH)


class Removed(nn.Module):
    """In a residual layer's place: its input (B, ...) is its output."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        return hidden_states if return_dict else (hidden_states,)


class Reduced:
    """Mixin of diffusers' networks: a network is made of its config and of the keys above."""

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        stock = dict(config or {})
        own = {k: stock.pop(k) for k in OWN if k in stock}
        made = super().from_config(stock, return_unused_kwargs, **kwargs)  # pyright: ignore
        network = made[0] if return_unused_kwargs else made
        for name in (names := [*own.get(REMOVED, ())]):
            network.set_submodule(name, Removed())
        network.register_to_config(**{**own, REMOVED: names})
        network.complete()
        return made

    def complete(self) -> None:
        """Add the modules that the keys above name; the layers that go are gone already."""


class ReducedUNet2DModel(Reduced, UNet2DModel):
    """A UNet2DModel without the layers of its config's `removed_units`."""


class ReducedUNet2DConditionModel(Reduced, UNet2DConditionModel):
    """A UNet2DConditionModel without the layers of its config's `removed_units`."""


class Encoded(Exception):
    """The encoder has run; the rest of the pass is not needed."""


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the module's own."""
    before = vars(module).get("forward")  # an instance attribute of someone else's
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Split:
    """The exact halves of a UNet: all that runs before its first up block, and the rest.

    Both take the arguments of the network's forward. The second reads the sample's shape alone.

    Args:
        forward: The whole network's; by default its own.
    """

    def __init__(self, unet: Any, forward: Callable[..., Any] | None = None) -> None:
        self.forward = forward or unet.forward
        parts = (unet.conv_in, *unet.down_blocks, unet.mid_block)
        self.encoder = [part for part in parts if part is not None]
        self.first: nn.Module = unet.up_blocks[0]

    def encode(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What the encoder's blocks return, in their order: the skips, and last the middle."""
        kept: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            raise Encoded

        with ExitStack() as stack:
            for part in self.encoder:
                hook = part.register_forward_hook(lambda _, __, output: kept.append(output))
                stack.callback(hook.remove)
            stack.enter_context(standing_in(self.first, stop))
            stack.enter_context(suppress(Encoded))
            self.forward(*args, **kwargs)
        return kept

    def decode(self, kept: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """The network's output, from what `encode` returned."""
        with ExitStack() as stack:
            for part, output in zip(self.encoder, kept, strict=True):
                stand_in = standing_in(part, lambda *_, output=output, **__: output)
                stack.enter_context(stand_in)
            return self.forward(*args, **kwargs)


def tiled(value: Any, n: int, size: int) -> Any:
    """Tensors (B, ...) of a batch of `size` as (n B, ...), the whole batch n times over; what is
    no tensor of the batch, as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value.repeat(n, *[1] * (value.ndim - 1))
    if isinstance(value, list | tuple):
        return type(value)(tiled(v, n, size) for v in value)
    if isinstance(value, dict):
        return {k: tiled(v, n, size) for k, v in value.items()}
    return value


class OnePassUNet2DConditionModel(ReducedUNet2DConditionModel):
    """A UNet2DConditionModel whose decoder runs at its config's `decoder_times` in one call."""

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The shares of the sample (B, C, ...) and of the decoder's outputs, as a stock UNet's
        output (B, C, ...); `timestep` is the encoder's, and the first of the decoder's."""
        times, (own, *shares) = self.config[TIMES], self.config[SHARES]
        size, n = len(sample), len(times)
        split, kwargs = Split(self, super().forward), {**kwargs, "return_dict": False}
        kept = split.encode(sample, timestep, encoder_hidden_states, *args, **kwargs)
        # the batch at the first time, then at the second, and so on, as `tiled` has it
        all_times = torch.cat([torch.full((size,), t, device=sample.device) for t in times])
        many = [tiled(v, n, size) for v in (kept, sample, encoder_hidden_states, args, kwargs)]
        kept, repeated, text, args, kwargs = many
        outputs = split.decode(kept, repeated, all_times, text, *args, **kwargs)[0].chunk(n)
        mixed = own * sample[:, : outputs[0].shape[1]]  # an input may have a mask beside it
        for share, output in zip(shares, outputs, strict=True):
            mixed = mixed + share * output
        return UNet2DConditionOutput(sample=mixed) if return_dict else (mixed,)


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
