"""Solvers: integrate a denoiser's ODE or SDE from noise to data in n steps.

All take `times` (n,) from noisy to clean, end with the last x̂, and see only α, σ and x̂. Orders and
formulas: DDIM (arXiv:2010.02502), Heun (arXiv:2206.00364), DPM-Solver++(2M) (arXiv:2211.01095).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from teachers import conditions
from teachers.conditions import GUIDANCE_SCALE, Cond
from teachers.denoiser import Denoiser, Guided
from teachers.errors import UserError, nearest
from teachers.process import Process, expand


def ddim(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """First order in (x/α, σ/α): Euler's method for rectified flow and EDM. n evaluations."""
    for t, s in pairs(times, x_t):
        x = denoiser(x_t, t, cond)
        x_t = x if s is None else denoiser.process.step(x_t, x, t, s)
    return x_t


def euler(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """First order in the process's own time: x_s = x_t + (s - t) dx/dt. n evaluations."""
    for t, s in pairs(times, x_t):
        x = denoiser(x_t, t, cond)
        if s is None:
            return x
        x_t = x_t + expand(s - t, x_t) * denoiser.process.velocity(x_t, x, t)
    return x_t


def heun_step(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """x_s, second order in (x/α, σ/α): the mean of ε at both ends.

    First order, as DDIM, for samples that start from pure noise, where x/α is infinite, or land on
    data, where ε is undefined.
    """
    process = denoiser.process
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, x_t), process.at(s, x_t)
    x = denoiser(x_t, t, cond)
    one_sided = (alpha_t == 0) | (sigma_s == 0)
    alpha_t, sigma_s = alpha_t.masked_fill(one_sided, 1), sigma_s.masked_fill(one_sided, 1)
    eps = process.eps(x_t, x, t)
    u, gap = x_t / alpha_t, sigma_s / alpha_s - sigma_t / alpha_t
    guess = alpha_s * (u + gap * eps)
    eps_s = (guess - alpha_s * denoiser(guess, s, cond)) / sigma_s
    second = alpha_s * (u + gap * (eps + eps_s) / 2)
    return torch.where(one_sided, process.noise(x, s, eps), second)


def heun(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """Second order in (x/α, σ/α), as EDM samples. 2n - 1 evaluations, one less from pure noise."""
    process = denoiser.process
    pure = is_pure_noise(process, times[:1])  # x/α is infinite: the first step is DDIM
    for t, s in pairs(times, x_t):
        if s is None:
            return denoiser(x_t, t, cond)
        if pure:
            x_t, pure = process.step(x_t, denoiser(x_t, t, cond), t, s), False
        else:
            x_t = heun_step(denoiser, x_t, t, s, cond)
    return x_t


def is_pure_noise(process: Process, t: Tensor) -> bool:
    """Whether α is 0 at a time (1,); no where the time has no value, as in a plan."""
    alpha = process.scales(t.cpu())[0]
    return not isinstance(alpha, FakeTensor) and alpha.item() == 0


def dpmpp_2m(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """Second order, multistep, in λ = log α/σ. n evaluations."""
    process, before, h_before = denoiser.process, None, None
    for t, s in pairs(times, x_t):
        x = denoiser(x_t, t, cond)
        if s is None:
            return x
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, x_t), process.at(s, x_t)
        h = (alpha_s / sigma_s).log() - (alpha_t / sigma_t).log()  # infinite from pure noise
        mean = x
        if before is not None and h_before is not None:
            lead = h / (2 * h_before)
            mean = (1 + lead) * x - lead * before
        x_t = sigma_s / sigma_t * x_t - alpha_s * torch.expm1(-h) * mean
        before, h_before = x, h
    return x_t


def ancestral(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """DDPM's own sampler: new noise at each step, from the posterior (DDIM with η = 1)."""
    process = denoiser.process
    for t, s in pairs(times, x_t):
        x = denoiser(x_t, t, cond)
        if s is None:
            return x
        x_t = process.posterior(x_t, x, t, s, torch.randn_like(x))
    return x_t


def cfgpp(
    guided: Guided, x_t: Tensor, times: Tensor, cond: Cond = None, strength: float = 0.6
) -> Tensor:
    """CFG++ (arXiv:2406.08070): DDIM to the guided x̂ by the unconditional noise. n × 2 evaluations.

    λ = `strength` in [0, 1] is no guidance scale g: x̂ is mixed with λ and noised again with the
    negative's ε, so that λ = 0 is unconditional DDIM. Of `guided` only its pair of x̂ is used; its
    scale and the condition's `guidance_scale` are not.

    Raises:
        UserError: `strength` is outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength: {strength} is outside [0, 1]; give λ, no guidance scale")
    process = guided.process
    _, cond = conditions.without(cond, GUIDANCE_SCALE)
    for t, s in pairs(times, x_t):
        x, negative = guided.pair(x_t, t, cond)
        mixed = negative + strength * (x - negative)
        if s is None:
            return mixed
        x_t = process.noise(mixed, s, process.eps(x_t, negative, t))
    return x_t


def double_steps(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """The stochastic sampler of guided distillation (arXiv:2210.03142, section 3.2).

    From each time a DDIM step of twice the length, then noise back to the next time, by the forward
    process. The last two steps lead to data: they end on x̂ of the last time. n evaluations.
    """
    process = denoiser.process
    steps = [*pairs(times, x_t)]
    for k, (t, s) in enumerate(steps):
        x = denoiser(x_t, t, cond)
        if s is None:
            return x
        further = steps[k + 1][1]
        if further is None:  # twice the length ends on data
            x_t = process.noise(x, s, torch.randn_like(x))
            continue
        (alpha, sigma), (alpha_r, sigma_r) = process.at(s, x_t), process.at(further, x_t)
        x_r = process.step(x_t, x, t, further)
        added = sigma**2 - (alpha / alpha_r * sigma_r) ** 2
        x_t = alpha / alpha_r * x_r + added.clamp(min=0).sqrt() * torch.randn_like(x)
    return x_t


def renoise(denoiser: Denoiser, x_t: Tensor, times: Tensor, cond: Cond = None) -> Tensor:
    """Consistency sampling: x̂, then new noise of the next time's level. n evaluations."""
    for t, s in pairs(times, x_t):
        x = denoiser(x_t, t, cond)
        x_t = x if s is None else denoiser.process.noise(x, s, torch.randn_like(x))
    return x_t


SOLVERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (ddim, euler, heun, dpmpp_2m, ancestral, renoise)
}


STATES = 4  # of a trajectory that a student learns, by default


def quadratic_times(n: int) -> list[float]:
    """n times below 1 down to 0, whose roots are spaced evenly (DSNO, arXiv:2211.13449)."""
    return [(k / n) ** 2 for k in range(n - 1, -1, -1)]


def solve_through(
    denoiser: Denoiser, z: Tensor, steps: int, method: str, cond: Cond, states: int
) -> tuple[Tensor, Tensor]:
    """As `solve`, on a grid that has the `quadratic_times` as well, and the states at those times.

    Returns:
        x̂ (B, ...), and the states x_t (B, states, ...), the last of which is x̂.
    """
    wanted = quadratic_times(states)
    found: dict[float, Tensor] = {}

    def note(module: Denoiser, args: tuple[Tensor, ...]) -> None:
        x_t, t = args[:2]
        place = next((w for w in wanted if abs(w - t[0].item()) < 1e-6), None)
        if place is not None:  # of Heun's two calls at a time, the state's is the later one
            found[place] = x_t

    handle = denoiser.register_forward_pre_hook(note)
    try:
        x = solve(denoiser, z, steps, method, cond, wanted[:-1])
    finally:
        handle.remove()
    found[0.0] = x
    return x, torch.stack([found[w] for w in wanted], 1)


def solve(
    denoiser: Denoiser,
    z: Tensor,
    steps: int,
    method: str = "heun",
    cond: Cond = None,
    further: Sequence[float] = (),
) -> Tensor:
    """Data x̂ from unit noise z (B, ...), by `steps` steps of a named solver on the process's grid.

    Args:
        further: Times that the grid has beside its own.

    Raises:
        UserError: no solver of that name, or steps < 1.
    """
    if method not in SOLVERS:
        raise UserError(f"solver {method!r}: unknown; {nearest(method, SOLVERS)}")
    if steps < 1:
        raise UserError(f"steps: expected at least 1, not {steps}")
    times = denoiser.process.grid(steps)
    more = [t for t in further if (times - t).abs().min() > 1e-6]
    times = torch.cat([times, times.new_tensor(more)]).sort(descending=True)[0].to(z.device)
    start = times[:1].to(z.dtype).expand(len(z))
    return SOLVERS[method](
        denoiser, denoiser.process.noise(torch.zeros_like(z), start, z), times, cond
    )


def pairs(times: Tensor, x: Tensor):
    """Each time with the next (None at the end), as (B,) tensors of x's type."""
    full = [t.to(x.dtype).expand(len(x)) for t in times]
    yield from zip(full, [*full[1:], None], strict=True)
