"""What a network of one's own predicts, its process and its time units, guessed for `distill wrap`.

Every combination is tried on data, and the one that denoises them best is the guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from distill.planning.wrap_labels import LabelReading
from teachers.denoiser import PREDICTIONS, Network
from teachers.diagnosis.checks import Subject
from teachers.diagnosis.evidence import SKILL, errors_of
from teachers.errors import clipped, first_line
from teachers.process import Karras, Linear, Process, Tabulated, Trig
from teachers.teacher import Pixels, Teacher

# The processes that are tried, by the source that makes them.
PROCESSES: dict[str, Process] = {
    "Linear()": Linear(),
    "Tabulated.linear()": Tabulated.linear(),
    "Tabulated.scaled_linear()": Tabulated.scaled_linear(),
    "Trig()": Trig(),
    "Karras()": Karras(),
}
# Times that networks read, as the adapter's source has them, and as functions of t.
LEVEL = "(0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7"  # σ of Karras()
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "1000 * t": lambda t: 1000 * t,
    "999 * t": lambda t: 999 * t,
    "1 - t": lambda t: 1 - t,
    LEVEL: lambda t: Karras().scales(t)[1],
    f"({LEVEL}).log() / 4": lambda t: Karras().scales(t)[1].log() / 4,
}
ITEMS = 64  # of the data, on which guesses are tried


@dataclass(frozen=True)
class Guess:
    """How a network may be read.

    process, predicts, time: Keys of PROCESSES, PREDICTIONS and TIMES.
    error: Of denoising, over the trivial estimate's; infinite where nothing was tried.
    fault: Why the network could not be tried on the data; "" where it could.
    """

    process: str = "Linear()"
    predicts: str = "flow"
    time: str = "t"
    error: float = math.inf
    fault: str = ""


class Timed(Network):
    """A network that is given its time in the unit that TIMES has under `unit`."""

    unit = "t"
    reading = LabelReading()

    def call(self, x_t: Tensor, t: Tensor, cond: Any, s: Tensor | None) -> Tensor:
        return self.reading.call(self.backbone, x_t, TIMES[self.unit](t), cond)


def guesses(
    network: nn.Module, x: Tensor, labels: Tensor | None, reading: LabelReading
) -> Iterator[Guess]:
    """Every reading of a network, with its error on data (N, ...) and their labels (N,), if any.

    One that raises has an infinite error, and a fault.
    """
    few = slice(None, None, max(1, len(x) // ITEMS))
    x = x[few][:ITEMS].float()
    cond = None if labels is None else {"class_labels": labels[few][:ITEMS]}
    for name, process in PROCESSES.items():
        for time, predicts in product(TIMES, PREDICTIONS):
            if "0.002" not in time or name == "Karras()":
                denoiser = Timed(network, process, predicts)
                denoiser.unit, denoiser.reading = time, reading
                teacher = Teacher(denoiser, Pixels(), tuple(x.shape[1:]))
                subject = Subject(teacher, x, x, cond, False, None)
                try:
                    with torch.no_grad():
                        errors = errors_of(subject, lambda x_t, t, d=denoiser: d(x_t, t, cond))
                except (Exception, SystemExit) as error:  # a user's own code may raise anything
                    fault = f"{type(error).__name__}: {clipped(first_line(error), 150)}"
                    yield Guess(name, predicts, time, fault=fault)
                    continue
                if all(map(math.isfinite, errors)):
                    mean = math.exp(sum(math.log(max(e, 1e-12)) for e in errors) / len(errors))
                    yield Guess(name, predicts, time, mean)


def best_guess(
    network: nn.Module, x: Tensor, labels: Tensor | None, reading: LabelReading
) -> Guess:
    """The reading that denoises data best; the usual one where none denoises better than a gain."""
    best = min(guesses(network, x, labels, reading), key=lambda g: g.error, default=Guess())
    return best if best.error < SKILL else Guess(error=best.error, fault=best.fault)
