"""Protocols: the prompts to sample, the reference to compare with, and the metrics.

A figure is only meaningful together with its protocol, so results repeat the protocol's name, the
number of samples and the number of seeds.
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
from eval.protocols.collect import Measurement
from eval.samples import Samples, to_uint8
from eval.stream import ONE_PROCESS, Processes

Sampler = Callable[[list[str], int], Samples]  # prompts, seed -> samples
SAVE_EVERY = 60  # seconds


@dataclass(frozen=True)
class Protocol:
    """A named way to measure.

    prompts: one sample is made for each.
    metrics: each from samples to named numbers.
    chunk: the number of samples in memory at a time; None for all.
    side: the samples' side in pixels; None for any.
    seeds: the number of seeds that figures are averaged over, unless another is given.
    classes: the number of classes if the prompts are labels; 0 if they are text.
    channels: the samples' number of channels.
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
        self, sampler: Sampler, seeds: int | None = None, processes: Processes = ONE_PROCESS
    ) -> dict[str, Any]:
        """Means over seeds 0, 1, …, with their spread (population standard deviation).

        `images_per_s` is the median over seeds of samples per second of generation. Chunk j of c
        uses the seed `seed * c + j`, so no noise is repeated. Several processes share the chunks,
        and every process returns all figures; the speed is this process's times their number.

        Raises:
            MetricError: the protocol has too few samples for a metric, or the sampler's images
                have another number or size.
        """
        self.check()
        seeds = self.seeds if seeds is None else seeds
        return self.average([self.measure_seed(sampler, s, processes) for s in range(seeds)])

    def check(self) -> None:
        """Refuse a protocol of too few samples, before any is made.

        Raises:
            MetricError: the protocol has too few samples for a metric.
        """
        for metric in self.metrics:
            if isinstance(metric, FeatureMetric) and metric.min_samples > len(self.prompts):
                raise MetricError(
                    f"protocol {self.name}: {len(self.prompts)} samples; "
                    f"{type(metric).__name__} takes {metric.min_samples} or more"
                )

    def measure_seed(
        self,
        sampler: Sampler,
        seed: int,
        processes: Processes = ONE_PROCESS,
        state: Path | None = None,
        identity: Any = None,
        progress: Callable[[int], None] = lambda n: None,
    ) -> dict[str, float]:
        """The figures of one seed, `images_per_s` included.

        Args:
            state: A file that keeps the state every minute; a call that was cut off resumes from
                it. Each process has a file of its own, named after its rank.
            identity: Plain data that determines the samples; a file of another identity is ignored.
            progress: Receives the number of this process's samples after each chunk.
        """
        measurement, saved = Measurement(self.metrics), time.monotonic()
        identity = [identity, self.name, seed, list(processes)]
        file = state and state.with_name(f"{state.name}.{processes.rank}")
        if file is not None:
            measurement.resume(file, identity)
        progress(measurement.n)
        for chunk in self._chunks(sampler, seed, processes, measurement.done):
            measurement.add(*chunk)
            progress(measurement.n)
            if file is not None and time.monotonic() - saved > SAVE_EVERY:
                measurement.save(file, identity)
                saved = time.monotonic()
        figures = measurement.figures(processes)
        if file is not None:
            file.unlink(missing_ok=True)
        speed = processes.count * measurement.n / max(measurement.seconds, 1e-9)
        return {**figures, "images_per_s": speed}

    def average(self, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
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

    def _chunks(
        self, sampler: Sampler, seed: int, processes: Processes, done: set[int]
    ) -> Iterator[tuple[int, int, Samples]]:
        """This process's chunks that are not done: number, number of the first sample, samples."""
        size = self.chunk or len(self.prompts)
        firsts = range(0, len(self.prompts), size)
        for number, first in enumerate(firsts):
            if number in done or not processes.owns(number):
                continue
            prompts = self.prompts[first : first + size]
            samples = sampler(prompts, seed * len(firsts) + number)
            self._check(samples, len(prompts))
            yield number, first, samples

    def _check(self, samples: Samples, n: int) -> None:
        if len(samples.images) != n:
            raise MetricError(
                f"protocol {self.name}: the sampler gives {len(samples.images)} samples; "
                f"it takes {n}"
            )
        sides = tuple(samples.images.shape[2:])
        if self.side and sides != (self.side, self.side):
            raise MetricError(
                f"protocol {self.name}: samples are {'×'.join(map(str, sides))} pixels; "
                f"it takes {self.side}×{self.side}"
            )


def read(path: Path) -> Protocol:
    """The protocol of a YAML file; its name is the file's.

    Raises:
        MetricError: the file is not valid, or its captions or reference are missing.
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


def _reader(name: str) -> Callable[[], Protocol]:
    path = spec.FOLDER / f"{name}.yaml"

    def reader() -> Protocol:
        return read(path)

    reader.__doc__ = spec.spec(path).summary
    return reader


PROTOCOLS: dict[str, Callable[[], Protocol]] = {name: _reader(name) for name in spec.names()}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        MetricError: there is none, or its captions or reference are missing.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]()


def floor(protocol_name: str = "digits", splits: int = 5) -> dict[str, float]:
    """The figures of real data against real data, the mean over `splits`.

    The digits are split at random, each class in half, because there are few. Shapes are drawn anew
    for the protocol's prompts, so their floor is the result of a perfect generator.

    Raises:
        MetricError: the protocol's data are not embedded.
    """
    known = {"digits": _digits_floor, "shapes": _shapes_floor}
    if protocol_name not in known:
        raise MetricError(
            f"floor: protocol {protocol_name!r} has no embedded data; "
            f"known: {', '.join(sorted(known))}"
        )
    figures = [known[protocol_name](seed) for seed in range(splits)]
    return {k: mean(f[k] for f in figures) for k in figures[0]}


def _digits_floor(seed: int) -> dict[str, float]:
    images, labels = digits.data()
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=rng)
    order = order[labels[order].argsort(stable=True)]
    a, b = to_uint8(images[order[::2]]), to_uint8(images[order[1::2]])
    metrics = (FID(digits.features, a), PRDC(digits.features, a))
    return {k: v for m in metrics for k, v in m(Samples(b, [])).items()}


def _shapes_floor(seed: int) -> dict[str, float]:
    shapes_protocol = protocol("shapes")
    prompts = shapes_protocol.prompts
    samples = Samples(shapes.draw(prompts, seed=seed), prompts)
    return {k: v for m in shapes_protocol.metrics for k, v in m(samples).items()}


def images_to_samples(images: Tensor, prompts: list[str], seconds: float) -> Samples:
    """Images (N, C, H, W) in [-1, 1] as samples."""
    return Samples(to_uint8(images.cpu()), prompts, seconds)
