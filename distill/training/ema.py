"""An exponential moving average of a player's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
