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

from eval import digits, shapes
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


def caption_accuracy(samples: Samples) -> dict[str, float]:
    """How often exact code reads the caption that was asked for, whole and by attribute."""
    return shapes.accuracy(samples.images, samples.prompts)


def _shapes() -> Protocol:
    """Two pictures of every caption, against ten; neighbours are counted among as many."""
    prompts = shapes.all_captions() * 2
    reference = shapes.draw(shapes.all_captions() * 10, seed=1_000_000)
    metrics = (
        FID(shapes.features, reference),
        PRDC(shapes.features, reference[: len(prompts)]),
        caption_accuracy,
    )
    return Protocol("shapes", prompts, metrics)


PROTOCOLS: dict[str, Callable[[], Protocol]] = {"digits": _digits, "shapes": _shapes}
METRICS = {
    "accuracy": "share of samples that read as what was asked for: a label, a whole caption",
    "colour_accuracy": "share of scenes in which exact code reads the colour asked for",
    "count_accuracy": "share of scenes in which exact code reads the number asked for",
    "coverage": "share of real samples with a fake in their k-neighbour ball (arXiv:2002.09797)",
    "density": "how many real balls hold each fake, over k (arXiv:2002.09797)",
    "fd": "Fréchet distance of features to the reference's (arXiv:1706.08500)",
    "images_per_s": "samples per second of generation",
    "position_accuracy": "share of scenes in which exact code reads the place asked for",
    "precision": "share of fakes inside some real ball (arXiv:1904.06991)",
    "recall": "share of real samples inside some fake ball (arXiv:1904.06991)",
    "shape_accuracy": "share of scenes in which exact code reads the shape asked for",
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
    metrics: tuple[Metric, ...] = (FID(digits.features, a), PRDC(digits.features, a))
    return {k: v for m in metrics for k, v in m(Samples(b, [])).items()}


def _shapes_floor(seed: int) -> dict[str, float]:
    measure = protocol("shapes")
    drawn = Samples(shapes.draw(measure.prompts, seed=seed), measure.prompts)
    return {k: v for m in measure.metrics for k, v in m(drawn).items()}


def images_to_samples(images: Tensor, prompts: list[str], seconds: float) -> Samples:
    """Pictures (N, C, H, W) in [-1, 1] as samples."""
    return Samples(to_uint8(images.cpu()), prompts, seconds)
