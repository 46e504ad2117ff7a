"""Guidance: wrappers that move x̂ away from a worse answer. Everywhere g = 1 is unguided.

What the worse answer is, is a class: no condition or a negative prompt (`Guided`), the same network
without some blocks (`SkipLayerGuided`), a weaker network (`AutoGuided`). How far to move from it is
a `mix`: `linear`, `Projected` or `Rescaled`. Where to, is `Interval`. All of them combine, and all
read each sample's own scale from the condition's `guidance_scale` where there is one. CFG++
changes the sampler and not x̂, so it is a solver: `teachers.solver.cfgpp`. `Adaptive` is stateful:
create one for each sampling run; it cannot be the teacher in training.

| paper | here |
|---|---|
| CFG, arXiv:2207.12598 | `Guided(denoiser, g, null)` |
| limited interval, arXiv:2404.07724 | `Interval(guided, low, high)` |
| APG, arXiv:2410.02416 | `Guided(denoiser, g, null, Projected(eta, threshold))` |
| CFG rescale, arXiv:2305.08891 | `Guided(denoiser, g, null, Rescaled(factor))` |
| autoguidance, arXiv:2406.02507 | `AutoGuided(denoiser, g, weaker)` |
| skip-layer guidance | `SkipLayerGuided(denoiser, g, blocks)` |
| adaptive guidance, arXiv:2312.12487 | `Adaptive(guided, threshold)` |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Cond, Denoiser, Guided, Mix, Scale, Wrapper, broadcast, linear
from teachers.errors import UserError
from teachers.features import blocks_of, changed
from teachers.process import expand

KEY = "teacher.guidance.blocks"  # the recipe key of skipped blocks, which begins error messages


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance (arXiv:2410.02416), without its momentum.

    x̂ - negative is shortened to at most `threshold`, and of what remains the component along x̂,
    which oversaturates, is multiplied by eta. eta = 1 without a threshold is linear guidance.
    The paper's momentum is left out: it is a state of the sampler, and a denoiser has none.

    Args:
        eta: Share of the parallel component that is kept; the paper's 0.
        threshold: The greatest norm over one datum; None for no limit.
    """

    eta: float = 0.0
    threshold: float | None = None

    def __call__(self, x: Tensor, negative: Tensor, scale: Scale) -> Tensor:
        gap = x - negative
        if self.threshold is not None:
            norm = expand(gap.flatten(1).norm(dim=1), gap)
            gap = gap * (self.threshold / norm.clamp(min=self.threshold))
        along = nn.functional.normalize(x.flatten(1), dim=1).view_as(x)
        parallel = expand((gap * along).flatten(1).sum(1), gap) * along
        return x + (broadcast(scale, x) - 1) * (gap - (1 - self.eta) * parallel)

    def __str__(self) -> str:
        limit = "" if self.threshold is None else f" and threshold {self.threshold:g}"
        return f"projected with η = {self.eta:g}{limit}"


@dataclass(frozen=True)
class Rescaled:
    """Guidance whose result is brought back towards x̂'s own standard deviation (arXiv:2305.08891).

    The paper scales the network's output; here it is x̂, whatever the network predicts.

    Args:
        factor: φ from 0 (not at all) to 1 (entirely).
        mix: What is rescaled.
    """

    factor: float
    mix: Mix = linear

    def __call__(self, x: Tensor, negative: Tensor, scale: Scale) -> Tensor:
        guided = self.mix(x, negative, scale)
        if self.factor == 0:
            return guided
        gain = x.flatten(1).std(1) / guided.flatten(1).std(1)
        return expand(1 + self.factor * (gain - 1), guided) * guided

    def __str__(self) -> str:
        inner = "" if self.mix is linear else f"{self.mix}, "
        return f"{inner}rescaled by {self.factor:g}"


class AutoGuided(Guided):
    """Autoguidance (arXiv:2406.02507): away from what a weaker network says of the same condition.

    Args:
        weaker: Smaller or less trained, under the same process; `Reparametrised` for another.
    """

    def __init__(
        self, denoiser: Denoiser, scale: float, weaker: Denoiser, mix: Mix = linear
    ) -> None:
        super().__init__(denoiser, scale, None, mix)
        self.weaker = weaker

    def guides(self, cond: Cond) -> bool:
        return True

    def pair(
        self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.denoiser(x_t, t, cond, s), self.weaker(x_t, t, cond, s)


class SkipLayerGuided(Guided):
    """Skip-layer guidance: away from what the same network says without some of its blocks.

    A skipped block still runs, and forward hooks put its input in place of its output.

    Args:
        blocks: Modules of the denoiser, by name, whose output is shaped like their input.

    Raises:
        UserError: the denoiser has no such block.
    """

    def __init__(
        self, denoiser: Denoiser, scale: float, blocks: Sequence[str], mix: Mix = linear
    ) -> None:
        super().__init__(denoiser, scale, None, mix)
        if not blocks:
            raise UserError(f"{KEY}: it is empty; name at least one block to skip")
        blocks_of(denoiser, blocks, KEY)
        self.blocks = tuple(blocks)

    def guides(self, cond: Cond) -> bool:
        return True

    def pair(
        self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.denoiser(x_t, t, cond, s)
        if torch.is_grad_enabled() and x_t.requires_grad and checkpointed(self.denoiser):
            # its backward would run the blocks again, when the hooks are gone
            raise UserError("skip-layer guidance: turn gradient checkpointing off in the teacher")
        with changed(self.denoiser, self.blocks, passed, KEY):
            worse = self.denoiser(x_t, t, cond, s)
        return x, worse


def checkpointed(denoiser: Denoiser) -> bool:
    """Whether a part of it recomputes its activations, as diffusers' models say that they do."""
    return any(vars(m).get("gradient_checkpointing", False) for m in denoiser.modules())


def passed(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the block's input in the form of its output.

    Blocks with two streams return them as a pair, (text, image) or (image, text).
    """
    given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
    inputs = [v for v in given.values() if isinstance(v, Tensor)]
    image = given.get("hidden_states", inputs[0] if inputs else None)
    text = given.get("encoder_hidden_states")
    if isinstance(output, Tensor):
        found: Any = image
        fits = alike(image, output)
    else:
        output = tuple(output)
        choices = [(image,)] if len(output) == 1 else [(text, image), (image, text)]
        fitting = [c for c in choices if len(c) == len(output) and all(map(alike, c, output))]
        fits = bool(fitting)
        # the last block of a two-stream network may have no text to return
        found = fits and tuple(a if o is not None else None for a, o in zip(fitting[0], output))
    if not fits:
        raise UserError(
            f"teacher.guidance.blocks: a {type(block).__name__} does not return what it was given "
            "in shape and cannot be skipped; name a transformer block or an attention layer"
        )
    return found


def alike(a: Any, b: Any) -> bool:
    return b is None or (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape)


class Interval(Wrapper):
    """Guidance where low < σ/α ≤ high, and elsewhere none (arXiv:2404.07724).

    Samples outside cost one evaluation. Which they are is asked of t, so the host waits for it.
    """

    def __init__(self, guided: Guided, low: float, high: float) -> None:
        super().__init__(guided.denoiser)
        self.guided, self.low, self.high = guided, low, high

    def inside(self, t: Tensor) -> Tensor:
        """Whether each t (B,) is guided."""
        alpha, sigma = self.process.scales(t.double())
        return (sigma > self.low * alpha) & (sigma <= self.high * alpha)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        inside = self.inside(t)
        count = int(inside.sum())
        _, plain = conditions.without(cond, GUIDANCE_SCALE)  # which an unguided x̂ does not need
        if count in (0, len(t)):
            return self.guided(x_t, t, cond, s) if count else self.denoiser(x_t, t, plain, s)
        parts = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
        found = []
        for denoiser, i, entries in zip((self.guided, self.denoiser), parts, (cond, plain)):
            some = conditions.rows(entries, i)
            found.append(denoiser(x_t[i], t[i], some, s if s is None else s[i]))
        return torch.cat(found)[torch.cat(parts).argsort()]


AGREED = 0.991  # the paper's γ̄


class Adaptive(Wrapper):
    """Adaptive guidance (arXiv:2312.12487): a sample is guided until its two x̂ agree, then no more.

    They agree when their cosine is at least `threshold`; that call is still guided, and all later
    ones of the sample cost one evaluation. Each sample stops by itself, whatever else is drawn.
    The paper takes the cosine of what the network predicts; here it is of x̂, as two predictions of
    noise agree where there is little else, which is where guidance begins.

    One is for one walk of a batch, whose rows keep their places: it remembers which have stopped.

    Args:
        guided: Guidance whose negative is a condition.
        threshold: γ̄; above 1 none ever stops.
    """

    def __init__(self, guided: Guided, threshold: float = AGREED) -> None:
        super().__init__(guided.denoiser)
        self.guided, self.threshold = guided, threshold
        self.left: Tensor | None = None  # (B,), whether each is still guided

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        own, cond = conditions.without(cond, GUIDANCE_SCALE)
        assert cond is not None and self.guided.null is not None
        if self.left is None:
            self.left = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
        i = self.left.nonzero()[:, 0]  # the host waits for it
        null = {k: self.guided.negative(k, v).expand_as(v) for k, v in cond.items()}
        both = {k: torch.cat([v, null[k][i]]) for k, v in cond.items()}
        times = torch.cat([t, t[i]])
        ends = s if s is None else torch.cat([s, s[i]])
        found = self.denoiser(torch.cat([x_t, x_t[i]]), times, both, ends)
        x, negative = found[: len(x_t)], found[len(x_t) :]
        guided = self.guided.mixed(x[i], negative, own if own is None else own[i])
        mixed = x.index_copy(0, i, guided)
        agree = nn.functional.cosine_similarity(x[i].flatten(1), negative.flatten(1))
        self.left = self.left.index_fill(0, i[agree >= self.threshold], False)
        return mixed


def describe(denoiser: Denoiser) -> str:
    """How a denoiser is guided, as one line; g = 1 is unguided."""
    if isinstance(denoiser, Interval):
        inner = describe(denoiser.guided)
        if denoiser.guided.scale == 1:
            return inner
        return f"{inner}, where {denoiser.low:g} < σ/α ≤ {denoiser.high:g}"
    if isinstance(denoiser, Guided) and denoiser.scale != 1:
        kind, detail = "classifier-free guidance", ""
        if isinstance(denoiser, AutoGuided):
            kind = "autoguidance"
        if isinstance(denoiser, SkipLayerGuided):
            kind, detail = "skip-layer guidance", f", without {', '.join(denoiser.blocks)}"
        mix = "" if denoiser.mix is linear else f", {denoiser.mix}"
        return f"{kind}, g = {denoiser.scale:g}: 1 is none{detail}{mix}"
    if isinstance(denoiser, Wrapper) and not isinstance(denoiser, Guided):
        return describe(denoiser.denoiser)
    return "unguided, g = 1"
