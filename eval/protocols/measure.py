"""Protocols: which samples are drawn, what they are compared with, and every metric of them.

A figure means something only with all of this said, so a protocol carries its name, its reference,
its sample count and its seeds, and its results repeat them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import torch
from torch import Tensor

from eval import digits, shapes
from eval.errors import MetricError, unknown
from eval.metrics.base import FeatureMetric, Metric
from eval.metrics.fid import FID
from eval.metrics.prdc import PRDC
from eval.protocols import spec
from eval.protocols.collect import Gathering
from eval.samples import Samples, to_uint8
from eval.stream import ALONE, Processes

Draw = Callable[[list[str], int], Samples]  # prompts, seed -> samples
EVERY = 60  # seconds after which what was collected is kept


@dataclass(frozen=True)
class Protocol:
    """A way of measuring, by name.

    prompts: one sample is drawn for each.
    metrics: each from samples to numbers.
    chunk: how many are drawn and held at a time; None for all at once.
    side: of the samples in pixels, where the protocol is of one.
    seeds: how many figures a mean is taken over, where no other number is asked for.
    classes: how many labels the prompts are of; 0 where they are text.
    channels: of the samples.
    """

    name: str
    prompts: list[str]
    metrics: tuple[Metric, ...]
    chunk: int | None = None
    side: int | None = None
    seeds: int = 3
    classes: int = 0
    channels: int = 3

    def __call__(
        self, draw: Draw, seeds: int | None = None, processes: Processes = ALONE
    ) -> dict[str, Any]:
        """Means over seeds 0, 1, …, with their spread (population standard deviation).

        `images_per_s` is the median over seeds of samples over seconds of generation. Chunk j of c
        is drawn with the seed `seed * c + j`, so no noise comes twice. Several processes share the
        chunks, and all have all figures; the speed is a process's own times their number.

        Raises:
            MetricError: the protocol's samples are too few for some metric, or those drawn are not
                the protocol's.
        """
        self.check()
        seeds = self.seeds if seeds is None else seeds
        return self.over([self.once(draw, seed, processes) for seed in range(seeds)])

    def check(self) -> None:
        """Refuse figures that cannot be given, before anything is drawn.

        Raises:
            MetricError: the protocol's samples are too few for some metric.
        """
        for metric in self.metrics:
            if isinstance(metric, FeatureMetric) and metric.least > len(self.prompts):
                raise MetricError(
                    f"protocol {self.name}: {len(self.prompts)} samples; "
                    f"{type(metric).__name__} takes {metric.least} or more"
                )

    def once(
        self,
        draw: Draw,
        seed: int,
        processes: Processes = ALONE,
        keep: Path | None = None,
        about: Any = None,
        told: Callable[[int], None] = lambda n: None,
    ) -> dict[str, float]:
        """The figures of one seed, its images_per_s among them.

        Args:
            keep: Where what is collected is kept every minute, so that a call that was cut off
                goes on from there; each process has a file of its own.
            about: Plain data that decides what is drawn; of any other, the file counts for nothing.
            told: Is told how many samples this process has drawn, after each chunk.
        """
        found, saved = Gathering(self.metrics), time.monotonic()
        about = [about, self.name, seed, list(processes)]
        file = keep and keep.with_name(f"{keep.name}.{processes.rank}")
        if file is not None:
            found.resume(file, about)
        told(found.n)
        for chunk in self._drawn(draw, seed, processes, found.done):
            found.add(*chunk)
            told(found.n)
            if file is not None and time.monotonic() - saved > EVERY:
                found.save(file, about)
                saved = time.monotonic()
        figures = found.figures(processes)
        if file is not None:
            file.unlink(missing_ok=True)
        return {**figures, "images_per_s": processes.count * found.n / max(found.seconds, 1e-9)}

    def over(self, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
        """The figures of several seeds as one row: means, and their spread."""
        names = [k for k in runs[0] if k != "images_per_s"]
        return {
            **{k: mean(r[k] for r in runs) for k in names},
            "images_per_s": median(r["images_per_s"] for r in runs),
            "spread": {k: pstdev([r[k] for r in runs]) for k in names},
            "protocol": self.name,
            "n": len(self.prompts),
            "seeds": len(runs),
        }

    def _drawn(
        self, draw: Draw, seed: int, processes: Processes, done: set[int]
    ) -> Iterator[tuple[int, int, Samples]]:
        """This process's chunks that are not done: their numbers, first samples, and samples."""
        size = self.chunk or len(self.prompts)
        firsts = range(0, len(self.prompts), size)
        for number, first in enumerate(firsts):
            if number in done or not processes.mine(number):
                continue
            prompts = self.prompts[first : first + size]
            samples = draw(prompts, seed * len(firsts) + number)
            self._check(samples, len(prompts))
            yield number, first, samples

    def _check(self, samples: Samples, n: int) -> None:
        if len(samples.images) != n:
            raise MetricError(f"protocol {self.name}: {len(samples.images)} samples; it takes {n}")
        sides = tuple(samples.images.shape[2:])
        if self.side and sides != (self.side, self.side):
            raise MetricError(
                f"protocol {self.name}: samples are {'×'.join(map(str, sides))} pixels; "
                f"it takes {self.side}×{self.side}"
            )


def read(path: Path) -> Protocol:
    """The protocol that a YAML file writes down, named as the file is.

    Raises:
        MetricError: it is not as it should be, or its captions or reference are missing.
    """
    name, written = path.stem, spec.spec(path)
    return Protocol(
        name,
        written.all_prompts(name),
        written.all_metrics(name),
        written.chunk,
        written.side,
        written.seeds,
        written.prompts.classes,
        written.channels,
    )


def _known(name: str) -> Callable[[], Protocol]:
    path = spec.FOLDER / f"{name}.yaml"

    def make() -> Protocol:
        return read(path)

    make.__doc__ = spec.spec(path).summary
    return make


PROTOCOLS: dict[str, Callable[[], Protocol]] = {name: _known(name) for name in spec.names()}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        MetricError: there is none, or what it is to be compared with is missing.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]()


def floor(protocol_name: str = "digits", splits: int = 5) -> dict[str, float]:
    """Real against real, the mean over `splits`.

    Digits are few: they are cut in two at random, each class in half. Shapes are drawn afresh for
    the protocol's own prompts, so theirs is what a perfect generator would get.
    """
    known = {"digits": _digits_floor, "shapes": _shapes_floor}
    if protocol_name not in known:
        raise MetricError(f"floor: protocol {protocol_name!r} keeps no data here")
    found = [known[protocol_name](seed) for seed in range(splits)]
    return {k: mean(f[k] for f in found) for k in found[0]}


def _digits_floor(seed: int) -> dict[str, float]:
    images, labels = digits.data()
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)
    order = order[labels[order].argsort(stable=True)]
    a, b = to_uint8(images[order[::2]]), to_uint8(images[order[1::2]])
    metrics = (FID(digits.features, a), PRDC(digits.features, a))
    return {k: v for m in metrics for k, v in m(Samples(b, [])).items()}


def _shapes_floor(seed: int) -> dict[str, float]:
    whole = protocol("shapes")
    drawn = Samples(shapes.draw(whole.prompts, seed=seed), whole.prompts)
    return {k: v for m in whole.metrics for k, v in m(drawn).items()}


def images_to_samples(images: Tensor, prompts: list[str], seconds: float) -> Samples:
    """Pictures (N, C, H, W) in [-1, 1] as samples."""
    return Samples(to_uint8(images.cpu()), prompts, seconds)
