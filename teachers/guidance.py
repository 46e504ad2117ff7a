"""Guidance: wrappers that move x̂ away from a worse prediction. Everywhere g = 1 is unguided.

The class says where the worse prediction comes from: no condition or a negative prompt (`Guided`),
the same network without some blocks (`SkipLayerGuided`), or a weaker network (`AutoGuided`). The
`mix` says how to move away from it: `linear`, `Projected` or `Rescaled`. `Interval` says at which
noise levels. All of them combine, and all read each sample's own scale from the condition's
`guidance_scale` where there is one. CFG++ changes the sampler and not x̂, so it is a solver:
`teachers.solver.cfgpp`. `Adaptive` is stateful: create one for each sampling run; it cannot be the
teacher in training. `DiscriminatorGuided` adds to any of them the gradient of a discriminator.

| paper | here |
|---|---|
| CFG, arXiv:2207.12598 | `Guided(denoiser, g, null)` |
| limited interval, arXiv:2404.07724 | `Interval(guided, low, high)` |
| APG, arXiv:2410.02416 | `Guided(denoiser, g, null, Projected(eta, threshold))` |
| CFG rescale, arXiv:2305.08891 | `Guided(denoiser, g, null, Rescaled(factor))` |
| autoguidance, arXiv:2406.02507 | `AutoGuided(denoiser, g, weaker)` |
| skip-layer guidance | `SkipLayerGuided(denoiser, g, blocks)` |
| of the first channels only, as DiT's code | `Guided(denoiser, g, null, FirstChannels(3))` |
| adaptive guidance, arXiv:2312.12487 | `Adaptive(guided, threshold)` |
| discriminator guidance, arXiv:2211.17091 | `DiscriminatorGuided(denoiser, log_ratio, w)` |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Cond, Denoiser, Guided, Mix, Scale, Wrapper, broadcast, linear
from teachers.errors import UserError
from teachers.features import blocks_of, changed
from teachers.process import Process, expand

LogRatio = Callable[[Tensor, Tensor, Cond], Tensor]  # of x_t (B, ...), t (B,), cond -> ℓ (B,)
KEY = "teacher.guidance.blocks"  # the recipe key of skipped blocks, which begins error messages


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance (arXiv:2410.02416), without its momentum.

    x̂ - negative is shortened to at most `threshold`; its component along x̂, which oversaturates,
    is then multiplied by eta. eta = 1 without a threshold is linear guidance. The paper's momentum
    is left out: it is a state of the sampler, and a denoiser has none.

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
    """Guidance rescaled towards the standard deviation of the unguided x̂ (arXiv:2305.08891).

    The paper rescales the network's output; here x̂ is rescaled, whatever the network predicts.

    Args:
        factor: φ from 0 (not at all) to 1 (entirely).
        mix: The guidance that is rescaled.
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


@dataclass(frozen=True)
class FirstChannels:
    """Guidance of the first channels of x̂ (B, C, …) only.

    The code of DiT, SiT and LightningDiT guides three channels of their latents, and their figures
    are of that.

    Args:
        channels: How many.
        mix: The guidance of these.
    """

    channels: int
    mix: Mix = linear

    def __call__(self, x: Tensor, negative: Tensor, scale: Scale) -> Tensor:
        first = slice(self.channels)
        guided = self.mix(x[:, first], negative[:, first], scale)
        return torch.cat([guided, x[:, self.channels :]], 1)

    def __str__(self) -> str:
        inner = "" if self.mix is linear else f"{self.mix}, "
        return f"{inner}of the first {self.channels} channels"


class AutoGuided(Guided):
    """Autoguidance (arXiv:2406.02507): away from a weaker network's x̂ under the same condition.

    Args:
        weaker: A smaller or less trained network under the same process. Wrap one of another
            process in `Reparametrised`.
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
    """Skip-layer guidance: away from the x̂ of the same network without some of its blocks.

    A skipped block still runs, and its input takes the place of its output.

    Args:
        blocks: Names of modules whose output is shaped like their input, as `named_modules()`
            gives them.

    Raises:
        UserError: the denoiser has no such block, or it is in a compiled module. A call raises it
            where a block's output is not shaped like its input.
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
            # the backward pass would run the blocks again, without the hooks
            raise UserError(
                f"{KEY}: skipped blocks cannot be recomputed; turn gradient checkpointing off in "
                "the teacher"
            )
        with changed(self.denoiser, self.blocks, skip, KEY):
            worse = self.denoiser(x_t, t, cond, s)
        return x, worse


def checkpointed(denoiser: Denoiser) -> bool:
    """Whether a part of it recomputes its activations, by the flag of diffusers' models."""
    return any(vars(m).get("gradient_checkpointing", False) for m in denoiser.modules())


def skip(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The input of a block in the form of its output.

    Blocks with two streams return a pair, (text, image) or (image, text).

    Raises:
        UserError: the output does not have the shape of the input.
    """
    given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
    inputs = [v for v in given.values() if isinstance(v, Tensor)]
    image = given.get("hidden_states", inputs[0] if inputs else None)
    if isinstance(output, Tensor):
        if fits(image, output):
            return image
    elif len(output) == 1:
        if fits(image, output[0]):
            return (image,)
    elif len(output) == 2:
        text = given.get("encoder_hidden_states")
        for pair in ((text, image), (image, text)):
            if all(map(fits, pair, output)):
                # the last block of a two-stream network may have no text to return
                return tuple(a if o is not None else None for a, o in zip(pair, output))
    raise UserError(
        f"{KEY}: a {type(block).__name__} does not return the shape of its input and cannot be "
        "skipped; name a transformer block or an attention layer"
    )


def fits(given: Any, output: Any) -> bool:
    """Whether an input can stand in for an output: both of one shape, or there is no output."""
    both = isinstance(given, Tensor) and isinstance(output, Tensor)
    return output is None or (both and given.shape == output.shape)


class Interval(Wrapper):
    """Guidance where low < σ/α ≤ high, and none elsewhere (arXiv:2404.07724).

    Samples outside cost one evaluation. The host waits for t to know which they are.
    """

    def __init__(self, guided: Guided, low: float, high: float) -> None:
        super().__init__(guided.denoiser)
        self.guided, self.low, self.high = guided, low, high

    def inside(self, t: Tensor) -> Tensor:
        """Whether each t (B,) is guided."""
        return between(self.process, t, self.low, self.high)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        inside = self.inside(t)
        count = int(inside.sum())
        _, plain = conditions.without(cond, GUIDANCE_SCALE)  # which an unguided x̂ does not need
        if count in (0, len(t)):
            return self.guided(x_t, t, cond, s) if count else self.denoiser(x_t, t, plain, s)
        parts = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
        estimates = []
        for denoiser, i, entries in zip((self.guided, self.denoiser), parts, (cond, plain)):
            some = conditions.rows(entries, i)
            estimates.append(denoiser(x_t[i], t[i], some, s if s is None else s[i]))
        return torch.cat(estimates)[torch.cat(parts).argsort()]


def between(process: Process, t: Tensor, low: float, high: float) -> Tensor:
    """Whether low < σ/α ≤ high at each t (B,)."""
    alpha, sigma = process.scales(t.double())
    return (sigma > low * alpha) & (sigma <= high * alpha)


PURE = 1000.0  # σ/α above which x_t is taken for noise alone, which no discriminator reads


class DiscriminatorGuided(Wrapper):
    """Discriminator guidance (arXiv:2211.17091): x̂ + w σ²/α ∇ℓ, where ℓ is a log-density ratio.

    ℓ(x_t, t, cond) = log p_t/q_t, of the data noised to t over the denoiser's own samples noised to
    t. w ∇ℓ is added to the score ∇ log q_t, and x̂ = (x_t + σ² score) / α. With the exact ℓ of an
    exact denoiser of its samples, and w = 1, the result is the data's exact denoiser.

    The gradient is taken whether or not the caller records gradients, and in inference mode too. It
    has a graph of its own only where the caller asks for gradients with respect to x_t. Samples
    outside the interval cost as much as those in it, so that the host need not wait for t.

    Differs from the authors' code, which has other weights for the two evaluations of a Heun step,
    and boosts in every second step: a denoiser does not know its solver.

    Args:
        denoiser: Guided or not; the samples that ℓ was learned from are its own.
        log_ratio: ℓ (B,); a module's weights are frozen.
        scale: w; 0 is the denoiser itself.
        interval: Low and high σ/α of the samples that are moved, low < σ/α ≤ high.
        boost: The factor of w for samples with ℓ < 0, which are taken for the denoiser's own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_ratio: LogRatio,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, PURE),
        boost: float = 1.0,
    ) -> None:
        super().__init__(denoiser)
        self.log_ratio, self.scale, self.interval, self.boost = log_ratio, scale, interval, boost
        if isinstance(log_ratio, nn.Module):
            log_ratio.requires_grad_(False).eval()

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        x = self.denoiser(x_t, t, cond, s)
        if self.scale == 0:
            return x
        _, cond = conditions.without(cond, GUIDANCE_SCALE)
        logits, slope = slope_of(self.log_ratio, x_t, t, cond)
        weight = torch.where(logits < 0, self.boost * self.scale, self.scale)
        alpha, sigma = self.process.at(t, x_t)
        moved = x + (expand(weight, x) * sigma**2 / alpha * slope).to(x.dtype)
        return torch.where(expand(between(self.process, t, *self.interval), x), moved, x)


def slope_of(f: LogRatio, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """f (B,) at x_t (B, ...), and its gradient (B, ...) with respect to x_t.

    The gradient has a graph where the caller records gradients and x_t requires one. Attention is
    then computed by its formula, since fused attention has no second derivative.
    """
    graph = torch.is_grad_enabled() and x_t.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        if not graph:  # copies, because autograd saves no tensor of inference mode
            x_t = x_t.clone().detach().requires_grad_()
            t, cond = t.clone(), conditions.each(cond, torch.clone)
        with sdpa_kernel(SDPBackend.MATH) if graph else nullcontext():
            values = f(x_t, t, cond)
        (slope,) = torch.autograd.grad(values.sum(), x_t, create_graph=graph)
    return values.detach(), slope


AGREED = 0.991  # the paper's γ̄


class Adaptive(Wrapper):
    """Adaptive guidance (arXiv:2312.12487): guide each sample until its two x̂ agree.

    They agree when their cosine is at least `threshold`. That call is still guided; all later calls
    of the sample cost one evaluation. Each sample stops on its own, whatever the batch holds. The
    paper takes the cosine of the network's predictions. Here it is the cosine of x̂, because two
    predictions of noise agree at high noise, which is where sampling begins.

    It is stateful, as it remembers which samples have stopped: create one for each sampling run of
    one batch, whose rows keep their places.

    Args:
        guided: Guidance whose negative is a condition.
        threshold: γ̄; above 1 no sample ever stops.
    """

    def __init__(self, guided: Guided, threshold: float = AGREED) -> None:
        super().__init__(guided.denoiser)
        self.guided, self.threshold = guided, threshold
        self.active: Tensor | None = None  # (B,), whether each sample is still guided

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        own, cond = conditions.without(cond, GUIDANCE_SCALE)
        assert cond is not None and self.guided.null is not None
        if self.active is None:
            self.active = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
        i = self.active.nonzero()[:, 0]  # the host waits for it
        cond, null = self.guided.branches(cond)
        both = {k: torch.cat([v, null[k][i]]) for k, v in cond.items()}
        times = torch.cat([t, t[i]])
        ends = s if s is None else torch.cat([s, s[i]])
        estimates = self.denoiser(torch.cat([x_t, x_t[i]]), times, both, ends)
        x, negative = estimates[: len(x_t)], estimates[len(x_t) :]
        guided = self.guided.mixed(x[i], negative, own if own is None else own[i])
        mixed = x.index_copy(0, i, guided)
        agree = nn.functional.cosine_similarity(x[i].flatten(1), negative.flatten(1))
        self.active = self.active.index_fill(0, i[agree >= self.threshold], False)
        return mixed


def describe(denoiser: Denoiser) -> str:
    """The guidance of a denoiser in one line; g = 1 is unguided."""
    if isinstance(denoiser, DiscriminatorGuided) and denoiser.scale != 0:
        low, high = denoiser.interval
        inner = describe(denoiser.denoiser)
        return f"{inner}; discriminator, w = {denoiser.scale:g} where {low:g} < σ/α ≤ {high:g}"
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
