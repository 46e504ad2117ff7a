"""What is collected of samples that come in chunks, so that a cut measurement can go on."""

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
from eval.stream import ALONE, Lanes, Processes, Tally


class Gathering:
    """Features and averages, read once for all metrics that share them, held in lanes.

    done: the numbers of the chunks that are in it.
    n, seconds: their samples, and the time that drawing them took.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.averages = [m for m in metrics if not isinstance(m, FeatureMetric)]
        self.readers = [m for m in metrics if isinstance(m, FeatureMetric)]
        self.lanes = {(m.features, m.keep): Lanes[Any](m.collector) for m in self.readers}
        self.means, self.names = Lanes(Tally), list[str]()
        self.done: set[int] = set()
        self.n, self.seconds = 0, 0.0

    def add(self, number: int, first: int, samples: Samples) -> None:
        """Collect a chunk, whose first sample has the number `first`.

        Raises:
            MetricError: features are not finite.
        """
        read = {f: checked(f(samples.images)) for f in {m.features for m in self.readers}}
        for (features, _), lane in self.lanes.items():
            lane.of(number).add(read[features], first)
        figures = {k: v for m in self.averages for k, v in m(samples).items()}
        figures |= samples.costs
        self.names = list(figures)
        row = torch.tensor([*figures.values()], dtype=torch.double)
        self.means.of(number).weigh(row, len(samples.images))
        self.done.add(number)
        self.n, self.seconds = self.n + len(samples.images), self.seconds + samples.seconds

    def figures(self, processes: Processes = ALONE) -> dict[str, float]:
        """Every metric's figures, of the chunks of all processes; all of them have them.

        Raises:
            MetricError: two metrics give a figure of one name.
        """
        seen = {key: lane.joined(processes) for key, lane in self.lanes.items()}
        figures = [m.measure(seen[m.features, m.keep]) for m in self.readers]
        figures.append(dict(zip(self.names, self.means.joined(processes).mean.tolist())))
        found: dict[str, float] = {}
        for part in figures:
            if twice := found.keys() & part.keys():
                raise MetricError(f"metrics: two of them give {min(twice)!r}; leave one out")
            found |= part
        return found

    def save(self, path: Path, about: Any) -> None:
        """Keep it in a file, whole or not at all, for a gathering that is about the same."""
        draft = path.with_name(f".{path.name}.draft")
        tensors = {
            f"{i}/{lane}/{j}": tensor.contiguous()
            for i, lanes in enumerate([*self.lanes.values(), self.means])
            for lane, collected in lanes.lanes.items()
            for j, tensor in enumerate(collected.tensors())
        }
        said = {"about": digest(about), "names": self.names, "done": sorted(self.done),
                "n": self.n, "seconds": self.seconds}  # fmt: skip
        # by way of bytes: save_file's own files are their owner's alone to read
        draft.write_bytes(save(tensors, {"gathering": json.dumps(said)}))
        draft.replace(path)

    def resume(self, path: Path, about: Any) -> None:
        """Take up what such a file holds, if there is one and it is about the same."""
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()["gathering"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return
        if said.get("about") != digest(about):
            return
        parts: dict[tuple[int, int], dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            i, lane, j = map(int, key.split("/"))
            parts.setdefault((i, lane), {})[j] = tensor
        lanes = [*self.lanes.values(), self.means]
        for (i, lane), found in parts.items():
            lanes[i].lanes[lane] = lanes[i].make().filled([found[j] for j in sorted(found)])
        self.names, self.done = said["names"], set(said["done"])
        self.n, self.seconds = said["n"], said["seconds"]


def digest(tree: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
