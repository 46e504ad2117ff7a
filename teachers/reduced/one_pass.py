"""A UNet whose decoder runs at all times of a chain in one call, as in TiUE (arXiv:2505.21960).

It makes a student of N steps one call: the encoder and the middle run once, the decoder at all N
times as one batch. The decoder never reads the samples between the steps, so N steps of DDIM are a
weighted sum of its input and its N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from teachers.reduced.network import SHARES, TIMES, ReducedUNet2DConditionModel


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
