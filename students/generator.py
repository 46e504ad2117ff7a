"""Few-step generators: a denoiser, and the handful of times at which it is called."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from teachers.denoiser import Cond, Denoiser


class Generator(nn.Module):
    """A few-step student: denoise to x̂, return to the next time, repeat.

    Args:
        denoiser: The network being distilled.
        times: When it is called, from noise to data; one entry per step.
        renoise: Return to the next time with fresh noise (True) or along the ODE (False).
        floor: The σ/α of the noise that x̂ still holds, so that renoising adds only the rest:
            σ_min for consistency models (arXiv:2303.01469, algorithm 1), else 0.
        start: The scale of z that it starts from; by default σ at the first time. DDPM's samplers
            take 1 there, although their last index still holds a trace of data.
        grids: For each step count that it can be run at, its times, where a scheduler's own are
            not every second or every fourth of `times`, which they are by default.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: Sequence[float] = (1.0,),
        renoise: bool = True,
        floor: float = 0.0,
        start: float | None = None,
        grids: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.times, self.renoise = denoiser, tuple(times), renoise
        self.floor, self.start = floor, start
        if not self.times or any(s >= t for t, s in zip(times, times[1:], strict=False)):
            raise ValueError(f"times must fall, and there must be one: {self.times}")
        grids = thinned(self.times) if grids is None else grids
        self.grids = {k: tuple(v) for k, v in grids.items()}

    def forward(
        self,
        z: Tensor,
        cond: Cond = None,
        steps: int | None = None,
        fresh: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x̂ after `steps` of the times (default: all) from unit noise z (B, ...).

        Gradients flow through the last step only; those before run as they do at inference.
        `fresh` gives the noise of each return, shaped like z; by default it is drawn.
        """
        times = [z.new_full((len(z),), t) for t in self.times[:steps]]
        x_t = z * (self.denoiser.process.at(times[0], z)[1] if self.start is None else self.start)
        with torch.no_grad():
            for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
                x = self.denoiser(x_t, t, cond)
                if not self.renoise:
                    x_t = self.denoiser.process.step(x_t, x, t, s)
                    continue
                noise = torch.randn_like(x) if fresh is None else fresh[i]
                alpha, sigma = self.denoiser.process.at(s, x)
                x_t = alpha * x + (sigma**2 - (alpha * self.floor) ** 2).sqrt() * noise
        return self.denoiser(x_t, times[-1], cond)

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that this student can be run at: those that divide its own."""
        return tuple(self.grids)

    def keep(self, *counts: int) -> Self:
        """Run at these counts alone from now on, as the others are not trained."""
        self.grids = {k: self.grids[k] for k in counts}
        return self

    def at(self, steps: int) -> Generator:
        """The same student run in fewer steps.

        Raises:
            ValueError: `steps` is not one of `counts`.
        """
        if steps not in self.counts:
            raise ValueError(f"a student of {len(self.times)} steps runs in {self.counts}")
        grids = {k: v for k, v in self.grids.items() if steps % k == 0}
        times = self.grids[steps]
        return Generator(self.denoiser, times, self.renoise, self.floor, self.start, grids)

    def draw(self) -> tuple[Generator, int]:
        """A step count, and a place in its chain: what one training step should simulate.

        Every chain is trained as it is sampled (backward simulation, arXiv:2405.14867). A count is
        drawn in proportion to 1/steps, which spends as much on each; a place uniformly. Uses
        Python's `random`, which the engine seeds alike on every process: ranks that took different
        places would wait for one another.
        """
        steps = random.choices(self.counts, [1 / k for k in self.counts])[0]
        return self.at(steps), random.randint(1, steps)


def thinned(times: Sequence[float]) -> dict[int, tuple[float, ...]]:
    """A grid for each count that divides the number of times: all of them, every second, …"""
    n = len(times)
    return {k: tuple(times[:: n // k]) for k in range(1, n + 1) if n % k == 0}
