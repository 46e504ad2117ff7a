"""Denoisers: every pretrained network, whatever it was trained to predict, read as x̂ = E[x | x_t].

Throughout, t and s are (B,), x and x_t are (B, ...); x̂ and its coefficients are float32 or wider.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE, PICTURE, Cond
from teachers.process import Process, expand

Scale = float | Tensor  # of guidance: one g, or each sample's own (B,)
Mix = Callable[[Tensor, Tensor, Scale], Tensor]  # x̂, the negative x̂, g -> the guided x̂
Prediction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # α, σ -> c_skip, c_out


def edm(sigma_data: float = 0.5, sigma_min: float = 0.0) -> Prediction:
    """EDM's preconditioning (arXiv:2206.00364); a σ_min > 0 makes it a consistency model's.

    Then x̂(x, σ_min) = x exactly (arXiv:2303.01469, appendix C): σ - σ_min replaces σ in c_skip and
    in the numerator of c_out. The network's input is x_t / √(σ² + σ_data²).
    """
    return partial(_edm, sigma_data=sigma_data, sigma_min=sigma_min)


def _edm(alpha: Tensor, sigma: Tensor, sigma_data: float, sigma_min: float):
    ratio = sigma / alpha  # of x_t / α, which is where EDM's formulas live
    gap = ratio - sigma_min
    c_skip = sigma_data**2 / (gap**2 + sigma_data**2)
    c_out = gap * sigma_data / (ratio**2 + sigma_data**2).sqrt()
    return c_skip / alpha, c_out


# What a network predicts, as the (c_skip, c_out) for which x̂ = c_skip x_t + c_out F.
PREDICTIONS: dict[str, Prediction] = {
    "x": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v": lambda alpha, sigma: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
    "flow": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "edm": edm(),
}


def coefficients(predicts: str | Prediction) -> Prediction:
    """The function of (α, σ) that a key of PREDICTIONS names, or that is given outright."""
    return PREDICTIONS[predicts] if isinstance(predicts, str) else predicts


def without_variance(output: Tensor, x_t: Tensor) -> Tensor:
    """A network's output without a learned variance, which no formula for x̂ reads.

    The variance (arXiv:2102.09672) is the second half of twice as many channels as x_t has.
    """
    channels = x_t.shape[1] if x_t.ndim > 1 else 0
    doubled = output.shape == (len(x_t), 2 * channels, *x_t.shape[2:])
    return output[:, :channels] if channels and doubled else output


class Denoiser(nn.Module):
    """x̂(x_t, t): the expected data behind a noisy sample."""

    process: Process

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        """The denoised x̂, shaped like x_t.

        s is the time (B,) that the next step will land on. Flow maps read it; denoisers ignore it.
        """
        raise NotImplementedError

    @property
    def inner_denoiser(self) -> Denoiser | None:
        """The denoiser that this one wraps or adapts; None where it wraps none."""
        return None

    def weight(self, t: Tensor) -> Tensor:
        """The loss weight (B,) that makes the squared error of x̂ the network's own loss."""
        raise NotImplementedError

    def loss(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The network's own denoising loss at times t: mean over dimensions, then the batch."""
        x_t = self.process.noise(x, t, torch.randn_like(x))
        error = (self(x_t, t, cond) - x).square().flatten(1).mean(1)
        return (self.weight(t) * error).mean()


@dataclass(frozen=True)
class SharedTimes:
    """Near t = 0 a network reads one time for each of a few intervals (E-TSDM, arXiv:2306.11251).

    Of a network that predicts noise, the derivative along time grows without bound there. Here it
    is 0 within an interval. Only what the network reads is shared: x_t, α, σ and the coefficients
    of x̂ keep the true time.

    Args:
        below: The intervals divide [0, below) evenly; later times are read as they are.
        intervals: Their number; 0 shares nothing.
    """

    below: float
    intervals: int

    def __call__(self, t: Tensor) -> Tensor:
        """The times (B,) that the network reads at t (B,): where t's interval begins."""
        if not self.intervals:
            return t
        width = self.below / self.intervals
        place = (t.double() / width + 1e-4).floor()  # t may be rounded from a beginning
        return torch.where(t < self.below, (place * width).to(t.dtype), t)


class Network(Denoiser):
    """A backbone F, turned into a denoiser by what it predicts. A learned variance is ignored.

    Args:
        backbone: F(x_t, t), or F(x_t, t, cond) where its third argument has the name cond.
        predicts: A key of PREDICTIONS, or a function of (α, σ) such as `edm(sigma_data)` makes.

    Attributes:
        share_times: Which times the backbone reads as one; None reads all as they are.
    """

    share_times: SharedTimes | None = None

    def __init__(self, backbone: nn.Module, process: Process, predicts: str | Prediction) -> None:
        super().__init__()
        self.backbone, self.process = backbone, process
        self.coefficients = coefficients(predicts)
        self.reads_cond = list(inspect.signature(backbone.forward).parameters)[2:3] == ["cond"]

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        """The backbone's raw output; subclasses match its signature and its time units."""
        _, cond = conditions.without(cond, GUIDANCE_SCALE)
        return self.backbone(x_t, t, cond) if self.reads_cond else self.backbone(x_t, t)

    def read_time(self, t: Tensor) -> Tensor:
        """The times (B,) at which the backbone is called for process times t (B,)."""
        return t if self.share_times is None else self.share_times(t)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        return self.denoised(x_t, t, self.call(x_t, self.read_time(t), cond, s))

    def denoised(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x̂ of the backbone's raw output for x_t at t."""
        c_skip, c_out = self.coefficients(*self.process.at(t, x_t))
        return c_skip * x_t + c_out * without_variance(output, x_t).to(c_out.dtype)

    def weight(self, t: Tensor) -> Tensor:
        _, c_out = self.coefficients(*self.process.scales(t))
        return c_out.square().clamp(min=1e-8).reciprocal()


class Wrapper(Denoiser):
    """A denoiser around another one, in the same process and with the same loss."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process

    @property
    def inner_denoiser(self) -> Denoiser:
        return self.denoiser

    def weight(self, t: Tensor) -> Tensor:
        return self.denoiser.weight(t)


def computes(module: nn.Module) -> bool:
    """Whether a call of this module is a network evaluation; wrappers only pass one on."""
    return isinstance(module, Denoiser) and not isinstance(module, Wrapper)


class Reparametrised(Wrapper):
    """A denoiser seen under another process: same σ/α, same x̂, rescaled input."""

    def __init__(self, denoiser: Denoiser, process: Process) -> None:
        super().__init__(denoiser)
        self.process = process

    def own(self, t: Tensor) -> Tensor:
        """The wrapped denoiser's time with the same σ/α, computed in float64 for the ends' sake.

        It is clamped to [0, 1]: noise beyond the training range is read as the most noise in it.
        """
        alpha, sigma = self.process.scales(t.double())
        tiny = torch.finfo(torch.float32).tiny  # where α = 0 the ratio must stay finite
        own = self.denoiser.process.time(sigma / alpha.clamp(min=tiny))
        return own.clamp(0, 1).to(t.dtype)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        own = self.own(t)
        scale = torch.hypot(*self.denoiser.process.at(own, x_t))
        scale = scale / torch.hypot(*self.process.at(t, x_t))
        return self.denoiser(scale * x_t, own, cond, s if s is None else self.own(s))

    def weight(self, t: Tensor) -> Tensor:
        return self.denoiser.weight(self.own(t))


def broadcast(scale: Scale, x: Tensor) -> Scale:
    """A scale to multiply x (B, ...) with: a float as it is, (B,) as (B, 1, ..., 1) in x's type."""
    return expand(scale.to(x), x) if isinstance(scale, Tensor) else scale


def linear(x: Tensor, negative: Tensor, scale: Scale) -> Tensor:
    """The guided x̂ of classifier-free guidance, on the line from the negative through x̂."""
    return negative + broadcast(scale, x) * (x - negative)


class Guided(Wrapper):
    """Classifier-free guidance (arXiv:2207.12598): x̂ = x̂(∅) + g (x̂(cond) - x̂(∅)).

    `scale` is g: 1 is unguided and costs one evaluation; the papers' w is g - 1. Both halves run
    as one batch of 2B. Other guidances are in `teachers/guidance.py`.

    A condition with the entry `guidance_scale` (B,) gives each sample its own g in place of
    `scale`. The wrapped denoiser does not see the entry, as its x̂ is what is mixed. Every batch
    then costs two evaluations; samples whose g is 1 get the unguided x̂.

    Args:
        scale: g of the samples whose condition has no `guidance_scale`.
        null: The condition of the negative x̂, each entry (1, ...): that of no condition, or of a
            negative prompt.
        mix: From x̂, the negative x̂ and g, a float or (B,), to the guided x̂.
    """

    def __init__(
        self, denoiser: Denoiser, scale: float, null: Cond = None, mix: Mix = linear
    ) -> None:
        super().__init__(denoiser)
        self.scale, self.null, self.mix = scale, null, mix
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def negative(self, key: str, like: Tensor) -> Tensor:
        """The null's entry (1, ...) on `like`'s device and in its type, moved there once.

        Moving it at each call would make the host wait for the device every time. A picture's is
        `like` itself: the picture is the same in both branches.
        """
        assert self.null is not None
        if key == PICTURE:
            return like
        place = (key, like.device, like.dtype)
        if place not in self._moved:
            self._moved[place] = self.null[key].to(like)
        return self._moved[place]

    def branches(self, cond: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The condition, and that of the negative x̂, with the same entries (B, ...)."""
        cond, own = conditions.branches(cond)
        null = {k: own[k] if k in own else self.negative(k, v) for k, v in cond.items()}
        return cond, {k: v.expand_as(cond[k]) for k, v in null.items()}

    def guides(self, cond: Cond) -> bool:
        """Whether there is something to move away from."""
        return cond is not None and self.null is not None

    def pair(
        self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x̂, and the negative x̂ that guidance moves away from.

        Args:
            cond: One that this guidance guides (see `guides`), without a `guidance_scale`.
        """
        assert cond is not None
        cond, negative = self.branches(cond)
        both = {k: torch.cat([v, negative[k]]) for k, v in cond.items()}
        twice = s if s is None else torch.cat([s, s])
        x, x_null = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, twice).chunk(2)
        return x, x_null

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        own, cond = conditions.without(cond, GUIDANCE_SCALE)
        if not self.guides(cond) or (own is None and self.scale == 1):
            return self.denoiser(x_t, t, cond, s)
        x, negative = self.pair(x_t, t, cond, s)
        return self.mixed(x, negative, own)

    def mixed(self, x: Tensor, negative: Tensor, own: Tensor | None) -> Tensor:
        """The guided x̂, by each sample's own scale (B,) or else by this guidance's one scale."""
        if own is None:
            return self.mix(x, negative, self.scale)
        return torch.where(expand(own == 1, x), x, self.mix(x, negative, own))
