"""The speed of training: images a second, the share of the card's rate, memory.

The host waits for the device at the last step of the warm-up, and else only where it would wait
anyway: when scalars are logged, and before grids, measurements and checkpoints, whose time does not
count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from distill.profiling import device_name, peak_memory
from distill.rates import rate_of

WARM_UP = 10  # steps of a process that do not count: they compile, and find their kernels
WINDOW = 50  # steps, at the least where so many were played, that a figure is an average of


class Work(NamedTuple):
    """FLOPs of training, from the samples that go through networks of the teacher's shape.

    Args:
        sample: FLOPs of one sample through the teacher's network.
        backward: By network, those of a backward pass over those of a forward one.
    """

    sample: float
    backward: Mapping[str, float]

    def flops(self, forward: Mapping[str, int], backward: Mapping[str, int]) -> float:
        """Of so many samples through each network, and so many of these with gradients."""
        passes = sum(forward.values())
        passes += sum(n * self.backward.get(name, 1.0) for name, n in backward.items())
        return self.sample * passes


class Speed(NamedTuple):
    """Figures of training at a logged step.

    Args:
        steps_per_s, images_per_s: Without the time of grids, measurements and checkpoints.
        share: Of the card's rate of matrix products; None where FLOPs or the rate are unknown.
        seconds: Of one step, with its share of the pauses since the warm-up.
        peak_gb: The most memory since training began.
        memory: For the terminal; empty on a CPU.
    """

    steps_per_s: float
    images_per_s: float
    share: float | None
    seconds: float
    peak_gb: float
    memory: str = ""

    def columns(self) -> dict[str, float]:
        """As columns of metrics.jsonl."""
        share = {} if self.share is None else {"speed/share": self.share}
        return {
            "speed/steps_per_s": self.steps_per_s,
            "speed/images_per_s": self.images_per_s,
            **share,
            "memory/peak_gb": self.peak_gb,
        }

    def text(self) -> str:
        """For a line on the terminal."""
        parts = [f"{short(self.images_per_s)} images/s"]
        if self.share is not None:
            parts.append(f"{self.share:.0%} of the card")
        return "  ".join([*parts, *filter(None, [self.memory])])


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Mark(NamedTuple):
    """A step, when it was finished in seconds without pauses, and the work until then."""

    step: int
    busy: float
    flops: float


class Speedometer:
    """Measures the speed of training from the end of the warm-up on.

    Args:
        batch: Samples of a step.
        flops: The FLOPs of this process until now; None where they are unknown.
    """

    def __init__(
        self,
        device: torch.device,
        batch: int,
        precision: str = "fp32",
        flops: Callable[[], float] | None = None,
    ) -> None:
        self.device, self.batch, self.flops = device, batch, flops
        # In float32, cuDNN's convolutions run in TF32, several times as fast as other products.
        mixed = precision == "fp32" and torch.backends.cudnn.allow_tf32
        known = device.type == "cuda" and flops is not None and not mixed
        self.tflops = rate_of(device_name(device), precision) if known else None
        self.planned_gb: float | None = None
        self._marks: list[Mark] = []
        self._paused = 0.0
        self._steps = self._start = 0

    def advance(self, step: int) -> None:
        """Count a step; at the end of the warm-up, wait for the device and start to measure."""
        self._steps += 1
        if self._steps == WARM_UP:
            self._wait()
            self._paused, self._start = 0.0, step
            self._marks = [self._mark(step)]

    def measure(self, step: int) -> Speed | None:
        """The speed up to a step whose scalars the host has just read; None in the warm-up."""
        if not self._marks or step == self._marks[-1].step:
            return None
        self._marks.append(self._mark(step))
        while self._marks[1].step <= step - WINDOW:
            del self._marks[0]
        first, last = self._marks[0], self._marks[-1]
        steps, busy = last.step - first.step, max(last.busy - first.busy, 1e-9)
        share = None
        if self.tflops is not None:
            share = (last.flops - first.flops) / busy / (self.tflops * 1e12)
        peak = peak_memory(self.device)
        return Speed(
            steps / busy,
            steps * self.batch / busy,
            share,
            busy / steps + self._paused / (step - self._start),
            peak,
            self._memory(peak),
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count."""
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self._paused += time.perf_counter() - began

    def _mark(self, step: int) -> Mark:
        busy = time.perf_counter() - self._paused
        return Mark(step, busy, self.flops() if self.flops else 0.0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _memory(self, peak: float) -> str:
        if self.device.type != "cuda":
            return ""
        if self.planned_gb is not None:
            return f"{peak:.1f} GB, {self.planned_gb:.1f} planned"
        total = torch.cuda.get_device_properties(self.device).total_memory / 1e9
        return f"{peak:.1f} of {total:.0f} GB"
