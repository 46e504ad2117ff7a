"""Few-step generators: a denoiser, and the handful of times at which it is called."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from teachers import conditions
from teachers.denoiser import Cond, Denoiser

Sees = Literal["last", "places"]  # x̂ after a chain's last step, or at every place of it


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
        self.weights: tuple[float, ...] = self.counts

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
        last = len(self.times[:steps]) - 1
        x_t = z * self.scale(z)
        with torch.no_grad():
            for k in range(last):
                x_t = self.step(x_t, k, cond, fresh[k] if fresh else None)
        t = z.new_full((len(z),), self.times[last])
        return self.denoiser(x_t, t, cond, torch.zeros_like(t))  # what is returned lands at 0

    def scale(self, z: Tensor) -> Tensor | float:
        """The standard deviation of the noise that the chain starts from."""
        if self.start is not None:
            return self.start
        return self.denoiser.process.at(z.new_full((len(z),), self.times[0]), z)[1]

    def step(self, x_t: Tensor, k: int, cond: Cond = None, noise: Tensor | None = None) -> Tensor:
        """x_t (B, ...) at the k-th time, brought to the next: x̂, with noise of that level again.

        A network of two times is told where its x̂ serves to land: at the next time of the ODE, or
        at 0, where noise is added afresh.
        """
        t, s = (x_t.new_full((len(x_t),), v) for v in self.times[k : k + 2])
        x = self.denoiser(x_t, t, cond, torch.zeros_like(s) if self.renoise else s)
        if not self.renoise:
            return self.denoiser.process.step(x_t, x, t, s)
        noise = torch.randn_like(x) if noise is None else noise
        alpha, sigma = self.denoiser.process.at(s, x)
        return alpha * x + (sigma**2 - (alpha * self.floor) ** 2).sqrt() * noise

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that this student can be run at, such as those that divide its own."""
        return tuple(self.grids)

    def keep(self, *counts: int, weights: Sequence[float] = ()) -> Self:
        """Run at these counts alone from now on, as the others are not trained.

        Args:
            weights: How often each is drawn in training; by default in proportion to its steps,
                so that every place of every chain is trained equally often.
        """
        self.grids = {k: self.grids[k] for k in counts}
        self.weights = tuple(weights) or self.counts
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
        """What one training step simulates: the student at one of its counts, and a first place.

        The first place is `rollout`'s. Counts are drawn by `weights`. Uses Python's `random`, which
        the engine seeds alike on every process, so that all ranks make the same number of calls.
        """
        steps = random.choices(self.counts, self.weights)[0]
        return self.at(steps), random.randrange(steps)

    def rollout(self, z: Tensor, cond: Cond = None, first: int = 0) -> Tensor:
        """x̂ (B, ...) of samples that stand at every place of the chain, from unit noise z (B, ...).

        Each chain is trained as it is sampled (backward simulation, arXiv:2405.14867), but one
        batch holds every place: B samples are shared out among the n places in turn, from place
        `first` on. So each place is trained equally often, a fake score that learns from the batch
        sees the mixture that it should model, and a batch costs (n + 1) / 2 calls a sample.
        Samples of later places come first in the batch. Gradients flow through each sample's last
        step only.
        """
        n, size = len(self.times), len(z)
        places = [(first + i) % n for i in range(size)]
        later = [sum(p > k for p in places) for k in range(n)]  # samples that go on after step k
        x_t = z * self.scale(z)
        for k, more in enumerate(later[:-1]):
            head = conditions.rows(cond, slice(None, more))
            with torch.no_grad():
                moved = self.step(x_t[:more], k, head) if more else x_t[:0]
            x_t = torch.cat([moved, x_t[more:]])
        share = [a - b for a, b in zip([size, *later], later)]  # samples that end at each place
        ends = [x_t.new_full((m,), t) for m, t in zip(share, self.times)]
        t = torch.cat(ends[::-1])
        return self.denoiser(x_t, t, cond, torch.zeros_like(t))

    @torch.no_grad()
    def samples(self, z: Tensor, cond: Cond, sees: Sees, first: int = 0) -> Tensor:
        """x̂ (B, ...) for those who learn from what the student draws; no gradient."""
        return self(z, cond) if sees == "last" else self.rollout(z, cond, first)


def thinned(times: Sequence[float]) -> dict[int, tuple[float, ...]]:
    """A grid for each count that divides the number of times: all of them, every second, …"""
    n = len(times)
    return {k: tuple(times[:: n // k]) for k in range(1, n + 1) if n % k == 0}
