"""Read a diffusers scheduler config: noise process, prediction type, time units.

| scheduler | process | predicts | time fed to the network |
|---|---|---|---|
| any with alphas_cumprod (DDPM, DDIM, …) | Tabulated | prediction_type | index, 0 to N - 1 |
| FlowMatch*, or any with use_flow_sigmas | Linear, shifted | flow | N σ |
| EDMEuler, EDMDPMSolverMultistep | Karras | EDM | ¼ log σ |
| CMStochasticIterative | Karras | EDM with the σ_min boundary | 250 log σ |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teachers.denoiser import Prediction, edm
from teachers.errors import UserError, clipped, nearest
from teachers.process import Karras, Linear, Process, Tabulated

CM = "CMStochasticIterativeScheduler"
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}

Time = Callable[[Tensor], Tensor]  # process time t (B,) -> the network's time input (B,)


@dataclass(frozen=True)
class Schedule:
    """How to interpret a network's inputs and outputs.

    Args:
        name, config: The diffusers scheduler class, and its config with all defaults.
        sigma_data: For EDM networks, whose input is x_t / √(σ² + σ_data²); None: the input is x_t.
    """

    process: Process
    predicts: str | Prediction
    time: Time
    name: str
    config: dict[str, Any]
    sigma_data: float | None = None


def log_sigma(process: Karras, scale: float) -> Time:
    """scale · log σ(t): scale is ¼ for EDM and 250 for consistency models."""
    return lambda t: scale * process.scales(t.double())[1].log().to(t.dtype)


def flow_time(process: Linear, units: int) -> Time:
    """units · σ(t), the time input of flow-matching networks."""
    return lambda t: units * process.scales(t.double())[1].to(t.dtype)


def read(name: str, config: dict[str, Any], who: str, tokens: int = 0) -> Schedule:
    """The schedule of a scheduler config.

    Args:
        name: The scheduler's class name.
        tokens: Sequence length of one sample, for resolution-dependent shift.

    Raises:
        UserError: the scheduler is not in the table above, or its config is contradictory.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    known = [CM, *EDM, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"]
    if kind is None:
        raise UserError(f"{who}: scheduler {clipped(name)!r} is unknown: {nearest(name, known)}")
    try:
        scheduler = kind.from_config(config)
        full = dict(scheduler.config)
        bar = getattr(scheduler, "alphas_cumprod", None)
    except Exception as error:  # diffusers validates little
        raise UserError(
            f"{who}: the scheduler's config cannot be read ({clipped(error, 200)}); correct it"
        ) from None
    if name == CM or name in EDM:
        return _karras(name, full, who)
    if name.startswith("FlowMatch") or full.get("use_flow_sigmas"):
        return _flow(name, full, who, tokens)
    if bar is None:
        raise UserError(f"{who}: scheduler {name} is not supported: {nearest(name, known)}")
    kind = full.get("prediction_type", "epsilon")
    if len(bar) != full["num_train_timesteps"]:
        raise UserError(
            f"{who}: the scheduler has {len(bar)} betas for {full['num_train_timesteps']} "
            "num_train_timesteps; correct its config"
        )
    # with zero terminal SNR some schedulers end just above 0, those of students at 0
    if kind == "epsilon" and (bar[-1] < 1e-10 or full.get("rescale_betas_zero_snr")):
        raise UserError(
            f"{who}: the last timestep is pure noise (rescale_betas_zero_snr), where ε does not "
            "determine x; give a model with prediction_type v_prediction"
        )
    if not isinstance(kind, str) or kind not in PREDICTS:
        raise UserError(f"{who}: prediction_type {clipped(kind)!r}: {nearest(str(kind), PREDICTS)}")
    process = Tabulated(bar)
    return Schedule(process, PREDICTS[kind], process.index, name, full)


Shift = float | tuple[float, float]


def shifted(name: str, config: dict[str, Any], shift: Shift, who: str) -> dict[str, Any]:
    """A scheduler's config with shifted noise levels.

    Of rectified flow, the shift replaces the scheduler's own. Of betas, σ/α is multiplied by it
    (simple diffusion, arXiv:2301.11093): log SNR falls by 2 log shift at each index. Of two shifts,
    the first is at index 0 and the second at the last; their logarithms are interpolated.

    Raises:
        UserError: the scheduler's levels cannot be shifted so.
    """
    import diffusers

    if name == CM or name in EDM:
        raise UserError(f"{who}: shift: EDM's networks read σ itself; remove it")
    pair = shift if isinstance(shift, tuple | list) else (shift, shift)
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if pair[0] != pair[1]:
            raise UserError(f"{who}: shift: rectified flow has one; give one number")
        key = "shift" if name.startswith("FlowMatch") else "flow_shift"
        return {**config, key: float(pair[1]), "use_dynamic_shifting": False}
    bar = getattr(getattr(diffusers, name).from_config(config), "alphas_cumprod", None)
    if bar is None:
        raise UserError(f"{who}: shift: {name} has no betas that could be shifted; remove it")
    bar = bar.double()
    t = torch.linspace(0, 1, len(bar), dtype=torch.float64)
    factor = 2 * (math.log(pair[0]) * (1 - t) + math.log(pair[1]) * t)
    bar = torch.sigmoid(torch.logit(bar) - factor)
    betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    if not (betas > 0).all():
        raise UserError(
            f"{who}: shift: from {pair[0]:g} to {pair[1]:g} the noise would not always rise; give "
            "factors that are closer"
        )
    return {**config, "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}


def _karras(name: str, full: dict[str, Any], who: str) -> Schedule:
    low, high = full["sigma_min"], full["sigma_max"]
    if not (isinstance(low, float | int) and isinstance(high, float | int) and 0 < low < high):
        raise UserError(
            f"{who}: sigma_min and sigma_max are {low!r}, {high!r}; expected 0 < min < max"
        )
    process = Karras(low, high, full["rho"])
    floor, scale = (full["sigma_min"], 250.0) if name == CM else (0.0, 0.25)
    if full.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(
            f"{who}: prediction_type of an EDM scheduler must be 'epsilon' (F in the EDM paper)"
        )
    predicts = edm(full["sigma_data"], floor)
    return Schedule(process, predicts, log_sigma(process, scale), name, full, full["sigma_data"])


def _flow(name: str, full: dict[str, Any], who: str, tokens: int) -> Schedule:
    kind = full.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction":
        raise UserError(
            f"{who}: prediction_type {clipped(kind)!r}: flow sigmas need 'flow_prediction'"
        )
    if full.get("invert_sigmas"):
        raise UserError(
            f"{who}: invert_sigmas is not supported; give a scheduler whose σ falls from 1 to 0"
        )
    shift = full.get("shift", full.get("flow_shift", 1.0))
    if full.get("use_dynamic_shifting"):
        shift = dynamic_shift(full, tokens)
    if not isinstance(shift, float | int) or not shift > 0:
        raise UserError(f"{who}: the scheduler's shift is {shift!r}; expected a positive number")
    process = Linear(float(shift))
    return Schedule(process, "flow", flow_time(process, full["num_train_timesteps"]), name, full)


def dynamic_shift(config: dict[str, Any], tokens: int) -> float:
    """The shift of `Linear` under resolution-dependent shifting, for `tokens` tokens.

    μ is linear in the length of the sequence; σ' = e^μ σ / (1 + (e^μ - 1) σ) (arXiv:2403.03206).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    start, end = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = start + (end - start) * (tokens - low) / (high - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
