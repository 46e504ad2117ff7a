"""Noising processes: x_t = α(t) x + σ(t) ε, with t running from 0 (data) to 1 (noise).

Throughout, t and s are (B,), x and x_t are (B, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, exp, log, pi
from typing import Any

import torch
from torch import Tensor


class Process:
    """A noising process, defined by its two scales; everything else follows from them."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α(t) and σ(t), shaped like t."""
        raise NotImplementedError

    def time(self, ratio: Tensor) -> Tensor:
        """The t at which σ(t)/α(t) equals `ratio`, shaped like it."""
        raise NotImplementedError

    def grid(self, steps: int) -> Tensor:
        """The `steps` times, from 1 down, at which a solver calls its network; float64 (steps,).

        A solver ends with the last x̂, so t = 0 is on the grid only where it is still noisy.
        """
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]

    def levels(self, n: int) -> list[float]:
        """n + 1 times from 0 up to 1 that divide the path into n steps."""
        return [k / n for k in range(n + 1)]

    def rounded(self, t: Tensor) -> Tensor:
        """Times down to which a sampler rounds t: of a discrete process, whole indices."""
        return t

    def __deepcopy__(self, memo: Any) -> Process:
        return self  # it is immutable, so copies of a network share it

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """α(t) and σ(t), shaped (B, 1, ..., 1) to broadcast against x; float32 or wider.

        Computed in float64: near the ends, float32 loses most of σ's digits.
        """
        alpha, sigma = self.scales(t.double())
        dtype = torch.promote_types(x.dtype, torch.float32)
        return expand(alpha, x).to(dtype), expand(sigma, x).to(dtype)

    def noise(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t, drawn from p(x_t | x) with the noise eps."""
        alpha, sigma = self.at(t, x)
        return alpha * x + sigma * eps

    def eps(self, x_t: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that separates x_t from x. Undefined where σ(t) = 0."""
        alpha, sigma = self.at(t, x_t)
        return (x_t - alpha * x) / sigma

    def step(self, x_t: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s, one DDIM step along the probability-flow ODE whose denoised end is x."""
        return self.noise(x, s, self.eps(x_t, x, t))

    def noisier(self, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t (B, ...) of x_s at lower times s (B,), by more noise of the forward process."""
        (alpha, sigma), (alpha_s, sigma_s) = self.at(t, x_s), self.at(s, x_s)
        kept = alpha / alpha_s
        return kept * x_s + (sigma**2 - (kept * sigma_s) ** 2).clamp(min=0).sqrt() * eps

    def posterior(self, x_t: Tensor, x: Tensor, t: Tensor, s: Tensor, eps: Tensor) -> Tensor:
        """x_s, drawn from q(x_s | x_t, x) at lower times s (B,) with the noise eps: DDPM's step.

        Of x_t's own noise a part stays, and eps takes the rest's place.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t, x_t), self.at(s, x_t)
        keep = alpha_t * sigma_s / (alpha_s * sigma_t)  # of x_t's noise; 0 from pure noise
        fresh = sigma_s * (1 - keep**2).clamp(min=0).sqrt()
        kept = (sigma_s**2 - fresh**2).clamp(min=0).sqrt()
        return alpha_s * x + kept * self.eps(x_t, x, t) + fresh * eps

    def end(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The x̂ from which a step from x_t lands on x_s: the inverse of `step`."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t, x_t), self.at(s, x_t)
        return (sigma_t * x_s - sigma_s * x_t) / (alpha_s * sigma_t - alpha_t * sigma_s)

    def velocity(self, x_t: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt along the probability-flow ODE whose denoised end is x."""
        t64 = t.double().clone()  # an expanded tensor cannot carry a tangent
        tangents = torch.func.jvp(self.scales, (t64,), (torch.ones_like(t64),))[1]
        d_alpha, d_sigma = tangents
        d_alpha, d_sigma = expand(d_alpha, x).to(x.dtype), expand(d_sigma, x).to(x.dtype)
        return d_alpha * x + d_sigma * self.eps(x_t, x, t)


@dataclass(frozen=True)
class Linear(Process):
    """Rectified flow (arXiv:2209.03003): x_t = (1 - σ) x + σ ε.

    σ = t, or leans towards noise by the factor `shift` (arXiv:2403.03206, as large images need):
    σ = shift t / (1 + (shift - 1) t), so that even times are the checkpoint's own.
    """

    shift: float = 1.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rest = 1 + (self.shift - 1) * t
        return (1 - t) / rest, self.shift * t / rest

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + self.shift / ratio)


@dataclass(frozen=True)
class Trig(Process):
    """TrigFlow (arXiv:2410.11081): x_t = cos(πt/2) x + σ_data sin(πt/2) ε."""

    sigma_data: float = 1.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(pi / 2 * t), self.sigma_data * torch.sin(pi / 2 * t)

    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio / self.sigma_data) * 2 / pi


@dataclass(frozen=True)
class Cosine(Process):
    """Simple diffusion (arXiv:2301.11093): the cosine path, shifted to an image's resolution.

    log SNR(t) = -2 log tan a(t) - 2 log shift, with a linear in t between the angles of ±`limit`.
    A shift of resolution / reference gives the average of as many pixels the noise that a picture
    of the reference resolution (32 or 64) has in one pixel.

    Args:
        shift: Factor of σ/α.
        shift_data: The factor at t = 0, where `shift` is that at t = 1 and their logarithms are
            interpolated; by default the same. In the paper, resolution / d_high.
        limit: log SNR at t = 0 without shifts, and minus that at t = 1.

    Raises:
        ValueError: σ/α would not rise everywhere.
    """

    shift: float = 1.0
    shift_data: float | None = None
    limit: float = 15.0

    def __post_init__(self) -> None:
        if not (self.shift > 0 and self.shifts[0] > 0 and self.limit > 0):
            raise ValueError("shift, shift_data and limit must be positive")
        # log tan a(t) rises by at least twice the range of a
        if log(self.shifts[0] / self.shift) >= 2 * (self.angles[1] - self.angles[0]):
            raise ValueError(f"shift_data {self.shift_data} is too far above shift {self.shift}")

    @property
    def shifts(self) -> tuple[float, float]:
        """The factors of σ/α at t = 0 and at t = 1."""
        return (self.shift if self.shift_data is None else self.shift_data), self.shift

    @property
    def angles(self) -> tuple[float, float]:
        """The angles a at t = 0 and at t = 1."""
        return atan(exp(-self.limit / 2)), atan(exp(self.limit / 2))

    def ratio(self, t: Tensor) -> Tensor:
        """σ/α at t."""
        (low, high), (start, end) = self.angles, self.shifts
        return torch.tan(low + t * (high - low)) * start * (end / start) ** t

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self.ratio(t)
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    def time(self, ratio: Tensor) -> Tensor:
        (low, high), (start, end) = self.angles, self.shifts
        if start == end:
            return (torch.atan(ratio / start) - low) / (high - low)
        wanted = ratio.double()
        below, above = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):  # halves the interval to the last bit of float64
            middle = (below + above) / 2
            less = self.ratio(middle) < wanted
            below, above = torch.where(less, middle, below), torch.where(less, above, middle)
        return ((below + above) / 2).to(ratio.dtype)


@dataclass(frozen=True)
class Karras(Process):
    """Variance exploding, spaced as in EDM (arXiv:2206.00364): x_t = x + σ(t) ε.

    σ^(1/ρ) is linear in t, from σ_min at t = 0 to σ_max at t = 1; a t outside [0, 1] extends it.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + t * (high - low)) ** self.rho

    def time(self, ratio: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (ratio ** (1 / self.rho) - low) / (high - low)

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps, dtype=torch.float64)


class Tabulated(Process):
    """Variance preserving, known at N indices (DDPM, arXiv:2006.11239); log σ/α is linear between.

    t = 0 is index 0, which is slightly noisy, and t = 1 is index N - 1, which is not pure noise.

    Args:
        alphas_cumprod: ᾱ (N,), as diffusers' schedulers hold it: α² at each index.
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        bar = bar.clamp(min=1e-12)  # zero-terminal-SNR tables end at 0, where log σ/α is infinite
        self.log_ratio = 0.5 * (torch.log1p(-bar) - bar.log())
        self.last = len(bar) - 1
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, n: int = 1000) -> Tabulated:
        """DDPM's betas, linear in the index."""
        betas = torch.linspace(start, end, n, dtype=torch.float64)
        return cls((1 - betas).cumprod(0))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, n: int = 1000) -> Tabulated:
        """Stable Diffusion's betas, whose square roots are linear in the index."""
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0))

    def __repr__(self) -> str:
        return f"Tabulated({self.last + 1} indices)"

    def index(self, t: Tensor) -> Tensor:
        """The fractional index at t, which is the time that such networks were trained to read."""
        return t * self.last

    def levels(self, n: int) -> list[float]:
        """Those of DDIM's grid, at indices: 0, then the last of each of n runs of as many indices.

        Of 1000 indices and 50 levels: 0, 19, 39, …, 999. A remainder is left out at the top.

        Raises:
            ValueError: there are fewer indices than levels.
        """
        if n > self.last + 1:
            raise ValueError(f"{n} levels of {self.last + 1} indices")
        run = (self.last + 1) // n
        return [max(k * run - 1, 0) / self.last for k in range(n + 1)]

    def rounded(self, t: Tensor) -> Tensor:
        return (self.index(t) + 1e-6).floor() / self.last  # t may be rounded from an index

    def table(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self.log_ratio.to(*key)
        return self._tables[key]

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table, i = self.table(t), self.index(t)
        below = i.detach().floor().clamp(0, self.last - 1).long()
        rho = table[below] + (i - below) * (table[below + 1] - table[below])  # log σ/α
        return torch.sigmoid(-2 * rho).sqrt(), torch.sigmoid(2 * rho).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        table, rho = self.table(ratio), ratio.log()
        below = (torch.searchsorted(table, rho) - 1).clamp(0, self.last - 1)
        fraction = (rho - table[below]) / (table[below + 1] - table[below])
        return (below + fraction) / self.last


def expand(s: Tensor, x: Tensor) -> Tensor:
    """s of shape (B,) as (B, 1, ..., 1), to broadcast against x."""
    return s.view(-1, *(1,) * (x.ndim - 1))
