"""Critics: small heads on a denoiser's features that tell fakes from data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from students.lora import AdaptedDenoiser
from teachers import conditions
from teachers.denoiser import Cond, Denoiser


class _Enough(Exception):
    """Every feature asked for is in: the rest of the network need not run."""


class Critic(nn.Module):
    """Logits (B,), high for data, read off a denoiser's inner features by hooks (arXiv:2405.14867).

    The denoiser is used, not owned: its weights are not among this module's parameters, and its
    forward pass stops at the last block that is hooked.

    Args:
        denoiser: Whose features; usually the fake score, which then learns from the critic too.
        shape: Of one datum, without the batch.
        cond: A condition of batch size 1, to run the denoiser once and read the features' shapes.
        blocks: Names of the hooked modules, as the denoiser's `named_modules()` has them; of the
            shared network's, where the denoiser is an adapter on one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        cond: Cond = None,
        blocks: Sequence[str] = ("backbone.mid_block",),
    ) -> None:
        super().__init__()
        modules = dict(network_of(denoiser).named_modules())
        if not blocks:
            raise ValueError("critic: name at least one block")
        if missing := [b for b in blocks if not b or b not in modules]:
            raise ValueError(f"critic: the denoiser has no block {missing[0]!r}")
        self._denoiser = (denoiser, [modules[b] for b in blocks])  # in a tuple: not a submodule
        x = torch.zeros(1, *shape, device=next(network_of(denoiser).parameters()).device)
        cond = conditions.moved(cond, x.device)
        with torch.no_grad():
            found = self.features(x, x.new_ones(1), cond)
        for name, f in zip(blocks, found, strict=False):
            if not isinstance(f, Tensor) or f.ndim not in (3, 4):
                raise ValueError(
                    f"critic: block {name!r} gives neither a feature map (B, C, H, W) "
                    "nor tokens (B, N, C)"
                )
        if len(found) != len(blocks):
            raise ValueError("critic: each block must run once in a forward pass")
        self.heads = nn.ModuleList(
            Tokens(f.shape[-1]) if f.ndim == 3 else head(f.shape[1], (f.shape[2], f.shape[3]))
            for f in found
        ).to(x.device)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> list[Tensor]:
        """The hooked blocks' outputs, (B, C, H, W) or tokens (B, N, C), in the order they run in.

        Of a block with two streams, of text and of the picture, this is the picture's.
        """
        denoiser, blocks = self._denoiser
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            found.append(picture(out))
            if len(found) == len(blocks):
                raise _Enough

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            stack.enter_context(suppress(_Enough))
            denoiser(x_t, t, cond)
        return found

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Logits (B,) of noisy samples x_t (B, ...) at times t (B,); the mean over heads."""
        found = self.features(x_t, t, cond)
        logits = [h(f.float()).flatten() for h, f in zip(self.heads, found, strict=True)]
        return torch.stack(logits).mean(0).float()


def network_of(denoiser: Denoiser) -> Denoiser:
    """The denoiser, or the shared network that it adapts."""
    return denoiser.denoiser if isinstance(denoiser, AdaptedDenoiser) else denoiser


class Head(nn.Sequential):
    """One logit (B, 1, 1, 1) of feature maps (B, C, H, W), which are halved and then read whole.

    Those of another shape than the first, as buckets have, are brought to that first one's before
    they are read: cells are averaged, or repeated.

    Args:
        size: Height and width of what the layer that reads all of it is made for.
        last: Which layer that is.
    """

    def __init__(self, layers: Sequence[nn.Module], size: tuple[int, int], last: int) -> None:
        super().__init__(*layers)
        self.size, self.last = size, last

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self):
            height, width = x.shape[-2:]
            if i < self.last:
                wanted = (max(2, height), max(2, width))  # or there is nothing to halve
            else:
                wanted = self.size if i == self.last else (height, width)
            if wanted != (height, width):
                x = nn.functional.adaptive_avg_pool2d(x, wanted)
            x = layer(x)
        return x


def head(channels: int, size: tuple[int, int]) -> Head:
    """Halve (B, C, *size) to at most 4×4, then read one logit (B, 1, 1, 1) off all of it."""
    layers: list[nn.Module] = []
    height, width = size
    while max(height, width) > 4:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), *block(channels)]
        height, width = max(1, height // 2), max(1, width // 2)
    last = len(layers)
    layers += [nn.Conv2d(channels, channels, (height, width)), *block(channels)]
    return Head([*layers, nn.Conv2d(channels, 1, 1)], (height, width), last)


def picture(out: Any) -> Any:
    """The picture's stream of a block's output: the last tensor, since that of text comes first."""
    if not isinstance(out, tuple):
        return out
    return next((o for o in reversed(out) if isinstance(o, Tensor)), None)


class Tokens(nn.Module):
    """One logit (B, 1) of tokens (B, N, C), whatever their number: each is read on its own, and
    what was read is averaged with learned weights, equal at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(),
            nn.Linear(channels, channels), nn.SiLU(),
        )  # fmt: skip
        self.attend = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.attend.weight)
        self.out = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        return self.out((self.attend(x).softmax(1) * x).sum(1))


def block(channels: int) -> tuple[nn.Module, nn.Module]:
    """Normalise in groups of 16 channels or more, then SiLU.

    The last normalisation sees one pixel: groups of one channel would leave nothing of it.
    """
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % (16 * g) == 0 or g == 1)
    return nn.GroupNorm(groups, channels), nn.SiLU()
