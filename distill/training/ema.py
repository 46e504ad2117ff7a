"""Averages of a player's weights during training: exponential, and power functions of the time.

Power functions are EDM2's (Karras et al. 2023, arXiv:2312.02696). Two of them, saved now and then,
give the average of any length after training (`distill/averaging/posthoc.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teachers.storage.files import save_tensors

SNAPSHOTS = "averages"  # in the run's folder


class EMA:
    """θ̄ ← β θ̄ + (1 - β) θ in float32; after n updates β is at most (n + 1)/(n + 10).

    Args:
        decay: β; 0 keeps no average, and `swapped` changes nothing.
    """

    def __init__(self, params: Iterable[nn.Parameter], decay: float = 0.999) -> None:
        self.params, self.decay, self.updates = list(params), decay, 0
        self.mean = [p.detach().float().clone() for p in self.params] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        if not self.decay:
            return
        decay = min(self.decay, (self.updates + 1) / (self.updates + 10))
        now = [p.detach() if p.dtype == torch.float32 else p.float() for p in self.params]
        torch._foreach_lerp_(self.mean, now, 1 - decay)
        self.updates += 1

    def restart(self) -> None:
        """Set the average to the current weights, and the count of updates to 0."""
        if self.decay:
            self._copy(self.mean, [p.detach().float() for p in self.params])
        self.updates = 0

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Run with the averaged weights in place of the current ones."""
        if not self.decay:
            yield
            return
        current = [p.detach().clone() for p in self.params]
        self._copy(self.params, self.mean)
        try:
            yield
        finally:
            self._copy(self.params, current)

    @staticmethod
    @torch.no_grad()
    def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for p, value in zip(to, values, strict=True):
            p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for mean, saved in zip(self.mean, state["mean"], strict=True):
            mean.copy_(saved)


def exponent(length: float) -> float:
    """γ of the power function τ^γ on [0, t] whose standard deviation is `length` times t.

    The largest root of γ³ + 7γ² + (16 - length⁻²)γ + 12 - length⁻² = 0. A length of 0.05 gives
    16.97, and 0.28867, that of an even average, 0.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA:
    """θ̂ ← β θ̂ + (1 - β) θ in float32, β = (1 - 1/n)^(γ + 1) at update n, for each length.

    After n updates, the weight of update k is proportional to about k^γ. The first update makes θ̂
    equal to θ.

    Args:
        lengths: The averages' relative lengths; none keeps no average.
    """

    def __init__(self, params: Iterable[nn.Parameter], lengths: Sequence[float] = ()) -> None:
        self.params, self.lengths = list(params), tuple(lengths)
        self.updates = self.stage = 0
        self.exponents = [exponent(v) for v in self.lengths]
        self.means = [[p.detach().float().clone() for p in self.params] for _ in self.lengths]

    @torch.no_grad()
    def update(self) -> None:
        """Move each average towards the current weights."""
        self.updates += 1
        if not self.lengths:
            return
        now = [p.detach() if p.dtype == torch.float32 else p.float() for p in self.params]
        for gamma, mean in zip(self.exponents, self.means, strict=True):
            kept = (1 - 1 / self.updates) ** (gamma + 1)
            torch._foreach_lerp_(mean, now, 1 - kept)

    def restart(self) -> None:
        """Begin anew at the next update. Snapshots of before are of an earlier stage."""
        self.updates, self.stage = 0, self.stage + 1

    def save(self, folder: Path, step: int) -> None:
        """Write the averages to a file of this step, whole or not at all."""
        if not (self.lengths and self.updates):
            return
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.safetensors"
        draft = path.with_name(f".{path.name}")
        tensors = {
            f"{length:g}/{i}": p.cpu()
            for length, mean in zip(self.lengths, self.means, strict=True)
            for i, p in enumerate(mean)
        }
        about = {"updates": str(self.updates), "stage": str(self.stage), "step": str(step)}
        save_tensors(tensors, draft, about)
        draft.replace(path)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "updates": self.updates, "stage": self.stage}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.stage = state["updates"], state["stage"]
        for mean, saved in zip(self.means, state["means"], strict=True):
            for p, value in zip(mean, saved, strict=True):
                p.copy_(value)
