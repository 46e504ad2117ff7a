"""Guards: when a student's scores fall below their best, training stops and the best is exported.

A few captions are soon learned by heart, so a fifth of their phrases is held out
(distill/data/expansion) and the student is watched on those. Every step until the stop is the same
as without guards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from distill.config.schema import GuardsSection

# Each has a limit of its name in GuardsSection.
SCORES = ("diversity", "matching", "nearest", "held_out")


class Guards:
    """Checks of a student, and what they found.

    Attributes:
        best: The best value of each score so far.
        step: The step of the best check, whose student is exported if training stops; 0 for none.
        reason: Why training stops; empty while it goes on.

    Args:
        limits: The recipe's section.
        measure: The scores of the student with its current weights, some of SCORES. Only the first
            process calls it.
    """

    def __init__(self, limits: GuardsSection, measure: Callable[[], dict[str, float]]) -> None:
        self.limits, self.measure = limits, measure
        self.best: dict[str, float] = {}
        self.scores: dict[str, float] = {}  # of the last check
        self.quality, self.step, self.reason = -1.0, 0, ""  # any first check is the best

    @property
    def stopped(self) -> bool:
        return bool(self.reason)

    def due(self, step: int) -> bool:
        """Whether the student is checked after this step."""
        return step >= self.limits.start and step % self.limits.every == 0

    def check(self, step: int, accelerator: Accelerator) -> bool:
        """Measure the student, and decide whether training stops; all processes decide alike.

        A failure of the measurement passes, after every process has the decision to go on.

        Returns:
            Whether this is the best check so far.
        """
        values, failure = [math.nan] * len(SCORES), None
        if accelerator.is_main_process:
            try:
                scores = self.measure()
                values = [scores.get(name, math.nan) for name in SCORES]
            except Exception as error:  # the others wait for this process
                failure = error
        if accelerator.num_processes > 1:
            # float32, which every device has
            sent = torch.tensor(values, dtype=torch.float32, device=accelerator.device)
            values = broadcast(sent).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        if failure is not None:
            raise failure
        return self.judge(step, dict(zip(SCORES, values, strict=True)))

    def judge(self, step: int, scores: dict[str, float]) -> bool:
        """Compare scores with their best, and note why training stops, if it does.

        Args:
            scores: NaN for a score that was not measured.

        Returns:
            Whether the product of the guarded scores is the best so far.
        """
        self.scores = {k: v for k, v in scores.items() if math.isfinite(v)}
        limits = {k: v for k in self.scores if (v := getattr(self.limits, k))}
        for name, limit in limits.items():
            value, best = self.scores[name], self.best.get(name, 0.0)
            if value < limit * best:
                self.reason = (
                    f"{name} is {value:.3f} at step {step}, below {limit:g} of its best, {best:.3f}"
                )
        self.best |= {k: max(v, self.best.get(k, 0.0)) for k, v in self.scores.items()}
        quality = math.prod(self.scores[k] for k in limits)
        if self.reason or quality <= self.quality:
            return False
        self.quality, self.step = quality, step
        return True

    def line(self) -> str:
        """The last check, and whether training stops, for the terminal."""
        values = "  ".join(f"{k} {v:.3f}" for k, v in self.scores.items())
        if not self.stopped:
            return f"guards: {values}"
        return f"guards: {self.reason}; training stops, and the student of step {self.step} is kept"

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "scores": self.scores,
            "quality": self.quality,
            "step": self.step,
            "reason": self.reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.scores = dict(state["best"]), dict(state["scores"])
        self.quality, self.step, self.reason = state["quality"], state["step"], state["reason"]
