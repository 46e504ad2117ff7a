"""Few-step generators: a denoiser and the few times at which it is called."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from teachers import conditions
from teachers.denoiser import Cond, Denoiser

# Which x̂ of a chain of steps: the last step's, or every step's. A step's index is its place.
ChainSamples = Literal["last", "places"]
# How a student returns to its next time: see `Generator`.
Renoise = bool | Literal["posterior"]


class Generator(nn.Module):
    """A few-step student: denoise to x̂, return to the next time, repeat.

    Args:
        denoiser: The network being distilled.
        times: The times of its steps, from noise to data.
        renoise: Return to the next time with fresh noise (True), along the ODE (False), or by a
            sample of q(x_s | x_t, x̂), which keeps a part of x_t's noise ("posterior"). A number
            between is CTM's γ (arXiv:2310.02279): go along the ODE to less noise, √(1 - γ²) of the
            next time's, and add the rest. No stock scheduler does that.
        floor: The σ/α of the noise that x̂ still contains; renoising adds only the rest. It is σ_min
            for consistency models (arXiv:2303.01469, algorithm 1), else 0.
        start: The standard deviation of the noise that the chain starts from; by default σ at the
            first time. DDPM's samplers use 1, although α is not 0 at their last index.
        grids: The times for each step count. By default, a count that divides the number of times
            uses every second of them, every third, and so on.

    Attributes:
        gamma: Of renoising, the share of the way to the next time that noise is added from (TCD,
            arXiv:2402.19159): a DDIM step leads further down, and then as much noise is added. The
            last step leads to time 0. None renoises x̂ itself.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: Sequence[float] = (1.0,),
        renoise: Renoise | float = True,
        floor: float = 0.0,
        start: float | None = None,
        grids: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.times = denoiser, tuple(times)
        self.renoise: Renoise | float = renoise
        self.floor, self.start = floor, start
        self.gamma: float | None = None
        if not self.times or any(s >= t for t, s in zip(times, times[1:], strict=False)):
            raise ValueError(f"times must decrease, and there must be at least one: {self.times}")
        grids = divisor_grids(self.times) if grids is None else grids
        self.grids = {k: tuple(v) for k, v in grids.items()}
        self.weights: tuple[float, ...] = self.counts

    def forward(
        self,
        z: Tensor,
        cond: Cond = None,
        steps: int | None = None,
        noises: Sequence[Tensor] | None = None,
        whole_chain: bool = False,
    ) -> Tensor:
        """x̂ (B, ...) after the first `steps` steps (default: all), from unit noise z (B, ...).

        Gradients flow through the last step only; earlier steps run without gradients.

        Args:
            noises: The noise of each renoising, shaped like z; by default it is drawn.
            whole_chain: Gradients flow through all steps, whose activations are kept.
        """
        last = len(self.times[:steps]) - 1
        x_t = z * self.scale(z)
        with torch.set_grad_enabled(whole_chain and torch.is_grad_enabled()):
            for k in range(last):
                x_t = self.step(x_t, k, cond, noises[k] if noises else None)
        return self.end(x_t, last, cond)

    def end(self, x_t: Tensor, k: int, cond: Cond = None) -> Tensor:
        """x̂ (B, ...) of x_t (B, ...) at the k-th time, as a sampler that ends there returns it."""
        t = x_t.new_full((len(x_t),), self.times[k])
        x = self.denoiser(x_t, t, cond, torch.zeros_like(t))  # what is returned lands at 0
        if self.gamma is not None:
            return self.denoiser.process.step(x_t, x, t, torch.zeros_like(t))
        return x

    def scale(self, z: Tensor) -> Tensor | float:
        """The standard deviation of the noise that the chain starts from."""
        if self.start is not None:
            return self.start
        return self.denoiser.process.at(z.new_full((len(z),), self.times[0]), z)[1]

    def step(self, x_t: Tensor, k: int, cond: Cond = None, noise: Tensor | None = None) -> Tensor:
        """Move x_t (B, ...) from the k-th time to the next, by renoising x̂ or along the ODE.

        A network of two times reads where its x̂ lands: at the next time of the ODE, or at 0 where
        x̂ is renoised.

        Args:
            noise: Of the renoising, shaped like x_t; by default it is drawn.
        """
        t, s = (x_t.new_full((len(x_t),), v) for v in self.times[k : k + 2])
        if self.renoises_in_part:
            return self.partial_step(x_t, t, s, cond, noise)
        x = self.denoiser(x_t, t, cond, torch.zeros_like(s) if self.renoise else s)
        if not self.renoise:
            return self.denoiser.process.step(x_t, x, t, s)
        noise = torch.randn_like(x) if noise is None else noise
        if self.renoise == "posterior":
            return self.denoiser.process.posterior(x_t, x, t, s, noise)
        if self.gamma is not None:
            return self.partly_renoised(x_t, x, t, s, noise)
        alpha, sigma = self.denoiser.process.at(s, x)
        return alpha * x + (sigma**2 - (alpha * self.floor) ** 2).sqrt() * noise

    @property
    def renoises_in_part(self) -> bool:
        """Whether `renoise` is a number between 0 and 1, CTM's γ."""
        return self.renoise != "posterior" and 0 < float(self.renoise) < 1

    def partly_renoised(
        self, x_t: Tensor, x: Tensor, t: Tensor, s: Tensor, noise: Tensor
    ) -> Tensor:
        """x_s: a DDIM step to (1 - γ) s, and from there noise up to s."""
        process = self.denoiser.process
        assert self.gamma is not None
        low = process.rounded((1 - self.gamma) * s.double()).to(s.dtype)
        return process.noisier(process.step(x_t, x, t, low), low, s, noise)

    def partial_step(
        self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond = None, noise: Tensor | None = None
    ) -> Tensor:
        """As `step`, from t to s (B,): along the ODE below s, and back to s with fresh noise."""
        process = self.denoiser.process
        alpha, sigma = process.scales(s.double())
        kept = (1 - float(self.renoise) ** 2) ** 0.5
        lower = process.time(kept * (sigma / alpha - self.floor) + self.floor).clamp(min=0).to(s)
        x = process.step(x_t, self.denoiser(x_t, t, cond, lower), t, lower)
        noise = torch.randn_like(x) if noise is None else noise
        return process.noisier(x, lower, s, noise)

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that this student can run at."""
        return tuple(self.grids)

    def keep(self, *counts: int, weights: Sequence[float] = ()) -> Self:
        """Drop all step counts but these, in place: the others are not trained.

        Args:
            weights: How often each count is drawn in training, relative to the others; by default
                its number of steps, which trains every step of every chain equally often.
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
        made = Generator(self.denoiser, times, self.renoise, self.floor, self.start, grids)
        made.gamma = self.gamma
        return made

    def sample_chain(self) -> tuple[Generator, int]:
        """Draw the chain of one training step: the student at one of its counts, and the place at
        which `rollout` begins.

        Counts are drawn by `weights`. Python's `random` is seeded alike on every process, so all
        ranks call the network equally often.
        """
        steps = random.choices(self.counts, self.weights)[0]
        return self.at(steps), random.randrange(steps)

    def rollout(self, z: Tensor, cond: Cond = None, first: int = 0) -> Tensor:
        """x̂ (B, ...) of samples at every step of the chain, from unit noise z (B, ...).

        Chains are simulated as at inference (backward simulation, arXiv:2405.14867), and one batch
        holds samples of all n steps: sample i ends at step (first + i) mod n. Each step is trained
        equally often, the fake score sees the mixture that it models, and a sample costs
        (n + 1) / 2 network calls on average. Samples that end later come first in the batch.
        Gradients flow through each sample's last step only.
        """
        x_t, t = self.inputs(z, cond, first), self.ends(z, first)
        return self.denoiser(x_t, t, cond, torch.zeros_like(t))

    def inputs(
        self, z: Tensor, cond: Cond = None, first: int = 0, gradient_steps: int = 1
    ) -> Tensor:
        """x_t (B, ...) that the last steps of a `rollout` from z (B, ...) begin with.

        Args:
            gradient_steps: Of each sample's steps, how many of the last ones gradients flow
                through, the one that begins at x_t included; their activations are kept.
        """
        x_t, remaining = z * self.scale(z), self.remaining(len(z), first)
        for k, count in enumerate(remaining[:-1]):
            # samples that end later come first: those too far from their end need no graph
            far = remaining[min(k + gradient_steps, len(remaining)) - 1]
            parts = [x_t[count:]]
            for part, graph in ((slice(far, count), True), (slice(0, far), False)):
                with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
                    if part.start < part.stop:
                        moved = self.step(x_t[part], k, conditions.rows(cond, part))
                        parts.insert(0, moved)
            x_t = torch.cat(parts)
        return x_t

    def ends(self, z: Tensor, first: int = 0) -> Tensor:
        """The times (B,) of the steps at which a `rollout` from z (B, ...) ends, in z's type."""
        return self.by_place(self.times, z, first)

    def landings(self, z: Tensor, first: int = 0) -> Tensor:
        """The times (B,) that those steps lead to: the chain's next ones, and 0 after the last."""
        return self.by_place((*self.times[1:], 0.0), z, first)

    def by_place(self, values: Sequence[float], z: Tensor, first: int) -> Tensor:
        """The value (B,) of the place at which each sample of a `rollout` ends, one a place."""
        remaining = self.remaining(len(z), first)
        ending = [a - b for a, b in zip([len(z), *remaining], remaining)]  # after each step
        return torch.cat([z.new_full((m,), v) for m, v in zip(ending, values)][::-1])

    def remaining(self, size: int, first: int) -> list[int]:
        """How many samples of a `rollout` of `size` samples go on after each of the steps."""
        n = len(self.times)
        at = [size // n + ((k - first) % n < size % n) for k in range(n)]  # samples of each place
        return [sum(at[k + 1 :]) for k in range(n)]

    @torch.no_grad()
    def samples(self, z: Tensor, cond: Cond, sees: ChainSamples, first: int = 0) -> Tensor:
        """x̂ (B, ...) that a fake score or a critic learns from; no gradient.

        Args:
            sees: Samples of the last step only, or of every step.
            first: As `rollout` has it.
        """
        return self(z, cond) if sees == "last" else self.rollout(z, cond, first)


def divisor_grids(times: Sequence[float]) -> dict[int, tuple[float, ...]]:
    """The times for each step count that divides their number: all, every second, every third, …"""
    n = len(times)
    return {k: tuple(times[:: n // k]) for k in range(1, n + 1) if n % k == 0}
