"""Protocols: which samples are drawn, what they are compared with, and every metric of them.

A figure means something only with all of this said, so a protocol carries its name, its reference,
its sample count and its seeds, and its results repeat them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median, pstdev
from typing import Any

import torch
from torch import Tensor

from eval import digits
from eval.errors import MetricError
from eval.fid import FID
from eval.prdc import PRDC
from eval.samples import Samples, to_uint8

Draw = Callable[[list[str], int], Samples]  # prompts, seed -> samples
Metric = Callable[[Samples], dict[str, float]]


@dataclass(frozen=True)
class Protocol:
    """A way of measuring, by name.

    prompts: one sample is drawn for each.
    metrics: each from samples to numbers.
    """

    name: str
    prompts: list[str]
    metrics: tuple[Metric, ...]

    def __call__(self, draw: Draw, seeds: int = 3) -> dict[str, Any]:
        """Means over seeds 0, 1, …, with their spread (population standard deviation).

        `images_per_s` is the median over seeds of samples over seconds of generation.
        """
        runs: list[dict[str, float]] = []
        speeds: list[float] = []
        for seed in range(seeds):
            samples = draw(self.prompts, seed)
            if len(samples.images) != len(self.prompts):
                raise MetricError(
                    f"protocol {self.name}: {len(samples.images)} samples; "
                    f"it takes {len(self.prompts)}"
                )
            runs.append({k: v for metric in self.metrics for k, v in metric(samples).items()})
            speeds.append(len(samples.images) / max(samples.seconds, 1e-9))
        return {
            **{k: mean(r[k] for r in runs) for k in runs[0]},
            "images_per_s": median(speeds),
            "spread": {k: pstdev([r[k] for r in runs]) for k in runs[0]},
            "protocol": self.name,
            "n": len(self.prompts),
            "seeds": seeds,
        }


def label_accuracy(samples: Samples) -> dict[str, float]:
    """How often the digits classifier reads the digit that was asked for."""
    with torch.no_grad():
        logits = digits.classifier()(samples.images.float() / 127.5 - 1)
    wanted = torch.tensor([int(p) for p in samples.prompts])
    return {"accuracy": (logits.argmax(1) == wanted).double().mean().item()}


def _digits() -> Protocol:
    """A sample for each of the 1,797 digits, with its label, against the scans themselves."""
    images, labels = digits.data()
    reference = to_uint8(images)
    metrics = (FID(digits.features, reference), PRDC(digits.features, reference), label_accuracy)
    return Protocol("digits", [str(v) for v in labels.tolist()], metrics)


PROTOCOLS: dict[str, Callable[[], Protocol]] = {"digits": _digits}
METRICS = {
    "accuracy": "share of samples that a classifier reads as the label asked for",
    "coverage": "share of real samples with a fake in their k-neighbour ball (arXiv:2002.09797)",
    "density": "how many real balls hold each fake, over k (arXiv:2002.09797)",
    "fd": "Fréchet distance of features to the reference's (arXiv:1706.08500)",
    "images_per_s": "samples per second of generation",
    "precision": "share of fakes inside some real ball (arXiv:1904.06991)",
    "recall": "share of real samples inside some fake ball (arXiv:1904.06991)",
}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        MetricError: there is none.
    """
    if name not in PROTOCOLS:
        raise MetricError(f"protocol {name!r} is unknown; known: {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[name]()


def floor(protocol_name: str = "digits", splits: int = 5) -> dict[str, float]:
    """Real against real: the data cut in two at random, each class in half, `splits` times over."""
    if protocol_name != "digits":
        raise MetricError(f"floor: protocol {protocol_name!r} keeps no data here")
    images, labels = digits.data()
    found: list[dict[str, float]] = []
    for seed in range(splits):
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=rng)
        order = order[labels[order].argsort(stable=True)]
        a, b = to_uint8(images[order[::2]]), to_uint8(images[order[1::2]])
        metrics: tuple[Metric, ...] = (FID(digits.features, a), PRDC(digits.features, a))
        found.append({k: v for m in metrics for k, v in m(Samples(b, [])).items()})
    return {k: mean(f[k] for f in found) for k in found[0]}


def images_to_samples(images: Tensor, prompts: list[str], seconds: float) -> Samples:
    """Pictures (N, C, H, W) in [-1, 1] as samples."""
    return Samples(to_uint8(images.cpu()), prompts, seconds)
