"""How a trained network wants to be read, shown by pictures that it denoises.

Every prediction type, time unit, latent scale and shift is tried, and one that denoises clearly
better than the adapter's own is named.

The measure is the trivial estimate, the posterior mean of a Gaussian with the pictures' own mean
and variance: no linear reading of an untrained network does better.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teachers.denoiser import PREDICTIONS, Cond, Network
from teachers.diagnosis.checks import Check, Subject, check

MARGIN = 0.7  # an alternative reading is named if its error is below this share of the adapter's

SKILL = 0.9  # and below this share of the trivial estimate's: then the weights surely mean it

LEVELS = (0.05, 0.15, 0.4, 1.0, 2.5, 7.0, 20.0)  # σ/α over the data's deviation

FEW = (0.15, 1.0, 7.0)  # those at which alternatives are tried

PUBLISHED = {"x": "sample", "eps": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}

PUBLISHED |= {"edm": "EDM's F", "-eps": "minus epsilon", "-v": "minus v_prediction"}

PUBLISHED |= {"-flow": "minus flow_prediction (x - ε)"}


@dataclass(frozen=True)
class Reading:
    """A way to read the network, and how well it then denoises.

    Args:
        errors: At each level, as a share of the trivial estimate's.
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
    """The network denoises pictures, and no other reading of it does so better."""
    denoiser = subject.denoiser
    own = Reading("", errors_of(subject, lambda x_t, t: denoiser(x_t, t, subject.cond)))
    # named only if clearly better: the best of all wins, as one mistake may half repair another
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
    """At each level, the error of an estimate of (x - shift) gain, over the trivial estimate's."""
    moved = Subject(
        subject.teacher, subject.images, (subject.x - shift) * gain, subject.cond, subject.told,
        subject.guided,
    )  # fmt: skip
    x, found = moved.x, []
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
        found.append((error / (trivial - x).square().mean()).item())
    return tuple(found) or (math.inf,)


def alternatives(subject: Subject) -> Iterator[Reading]:
    """Every other way to read the network, measured."""
    denoiser, cond = subject.denoiser, subject.cond
    for gain in (0.125, 0.18, 0.25, 1 / 3, 0.5, 0.7, 1.4, 2.0, 3.0, 4.0, 5.5, 8.0):
        told = f"vae scaling_factor: data times {gain:.3g} explain the network better …; "
        told += f"multiply scaling_factor by about {gain:.3g}"
        yield Reading(told, errors_of(subject, lambda x, t: denoiser(x, t, cond), FEW, gain))
    std, mean = subject.x.std().item(), subject.x.mean().item()
    for shift in (mean, *(k * std for k in (-1.5, -1.0, -0.7, -0.4, 0.4, 0.7, 1.0, 1.5))):
        sign = "less" if shift > 0 else "plus"
        told = f"vae shift_factor: data {sign} {abs(shift):.3g} explain the network better …; "
        told += "correct shift_factor"
        yield Reading(told, errors_of(subject, lambda x, t: denoiser(x, t, cond), FEW, shift=shift))
    if not isinstance(denoiser, Network):
        return
    says = next((k for k, v in PREDICTIONS.items() if v is denoiser.coefficients), "edm")
    raw: dict[float, Tensor] = {}  # the network's own outputs, by time: the same for all types
    for name, sign in [(k, 1) for k in PREDICTIONS] + [("eps", -1), ("v", -1), ("flow", -1)]:
        if name == says and sign == 1:
            continue
        other = PUBLISHED["-" * (sign < 0) + name]
        told = f"prediction_type: the config says {PUBLISHED[says]}, but {other} explains the "
        told += f"network better …; set prediction_type to {other}"
        yield Reading(told, errors_of(subject, predicting(denoiser, cond, name, sign, raw), FEW))
    for name, units in UNITS.items():
        told = f"time units: fed with {name} the network does better …; correct what call() gives "
        told += "the backbone as its time (num_train_timesteps)"
        yield Reading(told, errors_of(subject, timed(denoiser, cond, units), FEW))


def predicting(
    network: Network, cond: Cond, name: str, sign: int, raw: dict[float, Tensor]
) -> Estimate:
    """x̂ if the network predicted something else; keeps what it did predict in `raw`."""

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        skip, gain = PREDICTIONS[name](*network.process.at(t, x_t))
        at = t[0].item()
        if at not in raw:
            raw[at] = network.call(x_t, t, cond, None).to(gain.dtype)
        return skip * x_t + sign * gain * raw[at]

    return estimate


# Times as networks have been trained to read them, of t and σ/α in float64.
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
    """x̂ if the backbone were fed another time."""

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = network.process.scales(t.double())
        told = units(t.double(), sigma / alpha.clamp(min=1e-30))

        def tell(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            names = list(bound.arguments)
            name = "timestep" if "timestep" in names else names[1]  # diffusers', or the second
            old = torch.as_tensor(bound.arguments[name])
            new = told.to(old.dtype if old.is_floating_point() else torch.float32)
            new = new[0] if old.ndim == 0 else new.view(-1, *(1,) * (old.ndim - 1)).expand_as(old)
            bound.arguments[name] = new
            return bound.args, bound.kwargs

        hook = network.backbone.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            return network(x_t, t, cond)
        finally:
            hook.remove()

    return estimate


@torch.no_grad()
def description(subject: Subject) -> Iterator[Check]:
    """Pictures are explained better by what describes them than by nothing."""
    null = subject.teacher.codec.null
    if not subject.told or null is None or subject.cond is None:
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
