"""Layers of a network that can be in few bits, what calibration knows of them, and their rounding.

MixDQ (arXiv:2405.17873) has two cases of its own. The first token of a causal text encoder is the
same for every prompt, and an outlier, so keys and values of it are computed once, in full
precision. And where a shortcut reads the network's stream beside a skip, the two have scales that
differ much, and each gets its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.quantisation.rounding import WHOLE, Range, rounded_activation, rounded_weight
from teachers.features import hooked, replaced

SHORTCUT = "conv_shortcut"
TOKENS = ("attn2.to_k", "attn2.to_v")  # read the prompt's tokens
CONTENT = (".attn2.", ".ff.")  # in the names of layers that decide what is to be seen
SAME = 1e-5  # a first token of any prompt differs from another's by at most this


@dataclass(frozen=True)
class Bits:
    """Of a layer's weights and of its input; 16 are full precision."""

    weights: int = WHOLE
    activations: int = WHOLE


@dataclass
class Layer:
    """A linear layer or a convolution, as calibration saw it.

    weights: How many it has, without its bias.
    split: The first input of the second half of a shortcut's; 0 for one that has no halves.
    first: Its first token's input (1, 1, C), where that is the same for all prompts.
    ranges: Of its input, or of both halves; without the first token where that is the same.
    """

    module: Any
    name: str
    weights: int
    split: int = 0
    first: Tensor | None = None
    ranges: list[Range] = field(default_factory=list)

    @property
    def content(self) -> bool:
        """Whether it decides what a picture shows, and not how good it is."""
        return any(part in f".{self.name}." for part in CONTENT)


def layers(backbone: Any) -> dict[str, Layer]:
    """Every linear layer and convolution of a backbone by name, in its own order."""
    found = {}
    for name, module in backbone.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            split = stream_width(backbone, name) if name.endswith(SHORTCUT) else 0
            found[name] = Layer(module, name, module.weight.numel(), split)  # pyright: ignore
    return found


def stream_width(backbone: Any, name: str) -> int:
    """Channels of the stream that an up block's shortcut reads before those of the skip; else 0."""
    parts = name.split(".")
    if parts[0] != "up_blocks" or parts[2] != "resnets":
        return 0
    stage, place = int(parts[1]), int(parts[3])
    if place:
        before: Any = backbone.up_blocks[stage].resnets[place - 1]
    else:
        blocks = backbone.up_blocks if stage else backbone.down_blocks
        before = blocks[stage - 1].resnets[-1]
    width = int(before.out_channels)
    inside = 0 < width < backbone.get_submodule(name).in_channels
    return width if inside else 0


@torch.no_grad()
def calibrated(backbone: nn.Module, sample: Callable[[], Any]) -> dict[str, Layer]:
    """The layers that run in `sample`, with the ranges of their inputs.

    Args:
        sample: Calls the network on samples of at least two prompts, as its student does.
    """
    found = layers(backbone)
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    with ExitStack() as stack:
        for name, layer in found.items():
            note = noting(layer, seen[name])
            stack.enter_context(hooked(layer.module, lambda *_: None, note))
        sample()
    for name, layer in found.items():
        if layer.first is not None and any(len(v) == 0 for v in seen[name]):
            layer.first = None  # it differs between prompts
        extremes = [v for v in seen[name] if len(v)]
        if extremes:
            low, high = torch.stack(extremes).unbind(-1)
            lows, highs = low.amin(0).tolist(), high.amax(0).tolist()
            if name.endswith(TOKENS):  # the first row is the first token's
                used = slice(1, None) if layer.first is not None else slice(0, None)
                lows, highs = [min(lows[used])], [max(highs[used])]
            layer.ranges = [*zip(lows, highs, strict=True)]
    return {name: layer for name, layer in found.items() if layer.ranges}


def noting(layer: Layer, seen: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that notes the extremes (parts, 2) of a layer's input, and its first token.

    Where the first token differs between rows or calls, an empty tensor is noted beside them.
    """

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float()
        parts = [x]
        if layer.split:
            parts = [x[:, : layer.split], x[:, layer.split :]]
        elif layer.name.endswith(TOKENS) and x.ndim == 3 and x.shape[1] > 1:
            parts = [x[:, :1], x[:, 1:]]
            first = layer.first if layer.first is not None else x[:1, :1].clone()
            layer.first = first
            if not torch.allclose(x[:, :1], first.expand_as(x[:, :1]), atol=SAME):
                seen.append(x.new_zeros(0))
        seen.append(torch.stack([torch.stack([v.amin(), v.amax()]) for v in parts]).cpu())

    return note


@contextmanager
def in_bits(
    found: Mapping[str, Layer], bits: Mapping[str, Bits], first_token: bool = True
) -> Iterator[None]:
    """Within it, layers compute with rounded weights and rounded inputs.

    Args:
        bits: Of the layers that are rounded, by name.
        first_token: Whether a first token that is the same for all prompts is not rounded.
    """
    with ExitStack() as stack:
        for name, of in bits.items():
            if of != Bits():
                layer = found[name]
                stack.enter_context(replaced(layer.module, forward_of(layer, of, first_token)))
        yield


def forward_of(layer: Layer, bits: Bits, first_token: bool) -> Callable[[Tensor], Tensor]:
    """A layer's forward in these bits."""
    module, split = layer.module, layer.split
    weight = rounded_weight(module.weight.detach(), bits.weights, split)
    axis = 1 if isinstance(module, nn.Conv2d) else -1
    kept, ranges = first_token and layer.first is not None, layer.ranges
    if not kept and layer.first is not None:  # then the range has to hold that token as well
        (low, high), first = ranges[0], layer.first
        ranges = [(min(low, first.min().item()), max(high, first.max().item()))]

    def forward(x: Tensor) -> Tensor:
        shown = rounded_activation(x, bits.activations, ranges, split, axis)
        if isinstance(module, nn.Conv2d):
            return module._conv_forward(shown, weight, module.bias)
        out = F.linear(shown, weight, module.bias)
        if not kept:
            return out
        return torch.cat([F.linear(x[:, :1], module.weight, module.bias), out[:, 1:]], 1)

    return forward


@torch.no_grad()
def bake(found: Mapping[str, Layer], bits: Mapping[str, Bits]) -> None:
    """Round the weights of layers in place, those of the first token with the others."""
    for name, of in bits.items():
        layer = found[name]
        layer.module.weight.copy_(rounded_weight(layer.module.weight, of.weights, layer.split))
