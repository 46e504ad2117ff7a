"""The state of a measurement whose samples come in chunks; it can be saved and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eval.errors import MetricError
from eval.metrics.base import FeatureMetric, Metric, checked
from eval.samples import Samples
from eval.stream import ONE_PROCESS, LaneCollectors, MomentSums, Processes


class Measurement:
    """Features and averages of the chunks so far. Metrics of the same features share them.

    done: the numbers of the collected chunks.
    n, seconds: their samples, and the time of sampling.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.averages = [m for m in metrics if not isinstance(m, FeatureMetric)]
        self.feature_metrics = [m for m in metrics if isinstance(m, FeatureMetric)]
        self.features = {
            (m.features, m.keep): LaneCollectors[Any](m.collector) for m in self.feature_metrics
        }
        self.means, self.names = LaneCollectors(MomentSums), list[str]()
        self.done: set[int] = set()
        self.n, self.seconds = 0, 0.0

    def add(self, number: int, first: int, samples: Samples) -> None:
        """Collect a chunk, whose first sample has the number `first`.

        Raises:
            MetricError: features are not finite.
        """
        extractors = {m.features for m in self.feature_metrics}
        features = {f: checked(f(samples.images)) for f in extractors}
        for (extractor, _), lanes in self.features.items():
            lanes.collector(number).add(features[extractor], first)
        figures = {k: v for m in self.averages for k, v in m(samples).items()}
        figures |= samples.costs
        self.names = list(figures)
        row = torch.tensor([*figures.values()], dtype=torch.double)
        self.means.collector(number).add_mean(row, len(samples.images))
        self.done.add(number)
        self.n, self.seconds = self.n + len(samples.images), self.seconds + samples.seconds

    def figures(self, processes: Processes = ONE_PROCESS) -> dict[str, float]:
        """The figures of all metrics over the chunks of all processes, on every process.

        Raises:
            MetricError: two metrics give figures of one name.
        """
        merged = {key: lanes.merged(processes) for key, lanes in self.features.items()}
        parts = [m.measure(merged[m.features, m.keep]) for m in self.feature_metrics]
        parts.append(dict(zip(self.names, self.means.merged(processes).mean.tolist())))
        figures: dict[str, float] = {}
        for part in parts:
            if twice := figures.keys() & part.keys():
                raise MetricError(f"metrics: two of them give {min(twice)!r}; leave one out")
            figures |= part
        return figures

    def save(self, path: Path, identity: Any) -> None:
        """Write the state to a file, which `resume` accepts for the same identity only.

        Args:
            identity: Plain data that determines the samples.
        """
        draft = path.with_name(f".{path.name}.draft")
        tensors = {
            f"{i}/{lane}/{j}": tensor.contiguous()
            for i, lanes in enumerate([*self.features.values(), self.means])
            for lane, collector in lanes.lanes.items()
            for j, tensor in enumerate(collector.tensors())
        }
        header = {"about": digest(identity), "names": self.names, "done": sorted(self.done),
                  "n": self.n, "seconds": self.seconds}  # fmt: skip
        # save_file would make a file that only its owner can read
        draft.write_bytes(save(tensors, {"measurement": json.dumps(header)}))
        draft.replace(path)

    def resume(self, path: Path, identity: Any) -> None:
        """Take the state from a file of `save`, if it exists and has the same identity."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["measurement"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return
        if header.get("about") != digest(identity):
            return
        states: dict[tuple[int, int], dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            i, lane, j = map(int, key.split("/"))
            states.setdefault((i, lane), {})[j] = tensor
        collectors = [*self.features.values(), self.means]
        for (i, lane), state in states.items():
            empty = collectors[i].factory()
            collectors[i].lanes[lane] = empty.from_tensors([state[j] for j in sorted(state)])
        self.names, self.done = header["names"], set(header["done"])
        self.n, self.seconds = header["n"], header["seconds"]


def digest(tree: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
