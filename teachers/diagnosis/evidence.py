"""How a trained network's output is to be interpreted, shown by images that it denoises.

Every prediction type, time unit, latent scale and shift is tried. One that denoises clearly better
than the teacher's configuration is named.

Errors are relative to the trivial estimate: the posterior mean of a Gaussian with the images' own
mean and variance. No linear interpretation of an untrained network does better than it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from teachers.denoiser import PREDICTIONS, Cond, Network
from teachers.diagnosis.checks import Check, Subject, check

# An alternative is named if its error is below MARGIN of the configuration's error and below SKILL
# of the trivial estimate's, which an untrained network does not reach.
MARGIN, SKILL = 0.7, 0.9
LEVELS = (0.05, 0.15, 0.4, 1.0, 2.5, 7.0, 20.0)  # σ/α over the data's standard deviation
FEW = (0.15, 1.0, 7.0)  # the levels at which alternatives are tried
# Prediction types by their names in diffusers' configs.
PUBLISHED = {
    "x": "sample", "eps": "epsilon", "v": "v_prediction", "flow": "flow_prediction",
    "edm": "EDM's F", "-eps": "minus epsilon", "-v": "minus v_prediction",
    "-flow": "minus flow_prediction (x - ε)",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """An interpretation of the network, and how well it then denoises.

    Args:
        remedy: What to change in the configuration; "…" stands for the measured improvement.
        errors: At each level, the error divided by the trivial estimate's.
    """

    remedy: str
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """The geometric mean over levels."""
        logs = [math.log(max(e, 1e-12)) if math.isfinite(e) else 30.0 for e in self.errors]
        return math.exp(min(sum(logs) / len(logs), 30.0))


Estimate = Callable[[Tensor, Tensor], Tensor]  # x_t, t -> x̂


@torch.no_grad()
def denoising(subject: Subject) -> Iterator[Check]:
    """The network denoises images, and no other interpretation of it does so better."""
    denoiser = subject.denoiser
    own = Reading("", errors_of(subject, lambda x_t, t: denoiser(x_t, t, subject.cond)))
    # the best of all is named, as one mistake may partly repair another
    brief = Reading("", errors_of(subject, lambda x_t, t: denoiser(x_t, t, subject.cond), FEW))
    best = min(alternatives(subject), key=lambda r: r.error)
    value, bound = own.error, "< 1, of the trivial estimate's error"
    worst = max(own.errors)
    if best.error < SKILL and best.error < MARGIN * brief.error:
        change = f"(error {brief.error:.3g} → {best.error:.3g} of the trivial estimate's)"
        bound = f"≤ {best.error / MARGIN:.3g}"
        remedy = best.remedy.replace("…", change)
        yield Check("denoising, against other readings", brief.error, bound, "broken", remedy)
    elif min(own.error, best.error) >= 1:
        yield Check(
            "denoising", value, bound, "untrained?",
            "weights: no reading of this network denoises better than a constant and a gain; give "
            "--image a picture such as it was trained on, or --structure-only for random weights",
        )  # fmt: skip
    else:
        yield check("denoising, on average", value, bound, value < 1, UNKNOWN)
        yield check("denoising, at the worst level", worst, "≤ 1.5", worst <= 1.5, UNKNOWN)


UNKNOWN = (
    "denoising: the network does not lower the error at every noise level, and no single change of "
    "prediction_type, time units, scaling_factor or shift_factor mends that; does call() scale "
    "x_t, or drop channels, as the original does?"
)


def errors_of(
    subject: Subject,
    estimate: Estimate,
    levels: tuple[float, ...] = LEVELS,
    gain: float = 1.0,
    shift: float = 0.0,
) -> tuple[float, ...]:
    """At each level, the error of estimating (x - shift) × gain over the trivial estimate's."""
    moved = replace(subject, x=(subject.x - shift) * gain)
    x, errors = moved.x, []
    var, mean = x.var(correction=0).item(), x.mean()
    process = subject.denoiser.process
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = process.scales(ends)
    lowest, highest = (sigma / alpha.clamp(min=1e-30)).tolist()
    for level in levels:
        ratio = level * var**0.5
        if not lowest <= ratio <= highest:
            continue
        x_t, t = moved.noised(ratio)
        a, _ = process.at(t, x)
        trivial = mean + var / (var + ratio**2) * (x_t / a - mean)
        error = (estimate(x_t, t).float() - x).square().mean()
        errors.append((error / (trivial - x).square().mean()).item())
    return tuple(errors) or (math.inf,)


def alternatives(subject: Subject) -> Iterator[Reading]:
    """Every other interpretation of the network, with its errors."""
    denoiser, cond = subject.denoiser, subject.cond
    for gain in (0.125, 0.18, 0.25, 1 / 3, 0.5, 0.7, 1.4, 2.0, 3.0, 4.0, 5.5, 8.0):
        remedy = f"vae scaling_factor: data times {gain:.3g} explain the network better …; "
        remedy += f"multiply scaling_factor by about {gain:.3g}"
        yield Reading(remedy, errors_of(subject, lambda x, t: denoiser(x, t, cond), FEW, gain))
    std, mean = subject.x.std().item(), subject.x.mean().item()
    for shift in (mean, *(k * std for k in (-1.5, -1.0, -0.7, -0.4, 0.4, 0.7, 1.0, 1.5))):
        sign = "less" if shift > 0 else "plus"
        remedy = f"vae shift_factor: data {sign} {abs(shift):.3g} explain the network better …; "
        remedy += "correct shift_factor"
        yield Reading(
            remedy, errors_of(subject, lambda x, t: denoiser(x, t, cond), FEW, shift=shift)
        )
    if not isinstance(denoiser, Network):
        return
    declared = next((k for k, v in PREDICTIONS.items() if v is denoiser.coefficients), "edm")
    raw: dict[float, Tensor] = {}  # the network's own outputs, by time: the same for all types
    for name, sign in [(k, 1) for k in PREDICTIONS] + [("eps", -1), ("v", -1), ("flow", -1)]:
        if name == declared and sign == 1:
            continue
        other = PUBLISHED["-" * (sign < 0) + name]
        remedy = (
            f"prediction_type: the config says {PUBLISHED[declared]}, but {other} explains the "
        )
        remedy += f"network better …; set prediction_type to {other}"
        yield Reading(remedy, errors_of(subject, predicting(denoiser, cond, name, sign, raw), FEW))
    for name, units in UNITS.items():
        remedy = (
            f"time units: fed with {name} the network does better …; correct what call() gives "
        )
        remedy += "the backbone as its time (num_train_timesteps)"
        yield Reading(remedy, errors_of(subject, timed(denoiser, cond, units), FEW))


def predicting(
    network: Network, cond: Cond, name: str, sign: int, raw: dict[float, Tensor]
) -> Estimate:
    """x̂ if the network predicted another quantity; its raw outputs are kept in `raw`, by time."""

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        skip, gain = PREDICTIONS[name](*network.process.at(t, x_t))
        at = t[0].item()
        if at not in raw:
            raw[at] = network.call(x_t, t, cond, None).to(gain.dtype)
        return skip * x_t + sign * gain * raw[at]

    return estimate


# The time units that networks are trained with, as functions of t and σ/α in float64.
UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "t from 0 to 1": lambda t, r: t,
    "1000 t": lambda t, r: 1000 * t,
    "1 - t": lambda t, r: 1 - t,
    "1000 (1 - t)": lambda t, r: 1000 * (1 - t),
    "σ/(α + σ)": lambda t, r: r / (1 + r),
    "1000 σ/(α + σ)": lambda t, r: 1000 * r / (1 + r),
    "1 - σ/(α + σ)": lambda t, r: 1 / (1 + r),
    "1000 (1 - σ/(α + σ))": lambda t, r: 1000 / (1 + r),
    "σ/α": lambda t, r: r,
    "log σ/α": lambda t, r: r.log(),
    "¼ log σ/α": lambda t, r: r.log() / 4,
    "250 log σ/α": lambda t, r: 250 * r.log(),
}


def timed(network: Network, cond: Cond, units: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    """x̂ if the backbone were given another time."""

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = network.process.scales(t.double())
        times = units(t.double(), sigma / alpha.clamp(min=1e-30))

        def replace_time(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            names = list(bound.arguments)
            name = "timestep" if "timestep" in names else names[1]  # diffusers', or the second
            old = torch.as_tensor(bound.arguments[name])
            new = times.to(old.dtype if old.is_floating_point() else torch.float32)
            new = new[0] if old.ndim == 0 else new.view(-1, *(1,) * (old.ndim - 1)).expand_as(old)
            bound.arguments[name] = new
            return bound.args, bound.kwargs

        hook = network.backbone.register_forward_pre_hook(replace_time, with_kwargs=True)
        try:
            return network(x_t, t, cond)
        finally:
            hook.remove()

    return estimate


@torch.no_grad()
def description(subject: Subject) -> Iterator[Check]:
    """Images are denoised better with their description than with the null condition."""
    null = subject.teacher.codec.null
    if not subject.described or null is None or subject.cond is None:
        yield Check("description", None, "needs --prompt and a null condition", "left out")
        return
    none = {k: v.to(subject.x.device).expand_as(subject.cond[k]) for k, v in null.items()}
    pairs = [
        Reading("", errors_of(subject, lambda x, t, c=c: subject.denoiser(x, t, c), FEW))
        for c in (subject.cond, none)
    ]
    value = pairs[0].error / pairs[1].error
    yield check(
        "error with the description over without", value, "≤ 1", value <= 1,
        "codec.condition and codec.null: pictures are explained better by null than by what "
        "describes them, so guidance would move away from it; are labels off by one, or the two "
        "swapped?",
    )  # fmt: skip
