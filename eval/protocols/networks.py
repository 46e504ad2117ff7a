"""Which network each figure of a protocol reads images with, and which figures are held out.

A student that learned from a network's features or scores can please that network alone. A figure
is held out where no network that the training used reads its images: exact code, or another one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from eval.catalogue import name_of
from eval.metrics.features import CLIP_L_336, EXTRACTORS
from eval.protocols import spec
from eval.shapes import Scene

CODE = ""  # exact code reads the images, and no network
OF_PRDC = ("precision", "recall", "density", "coverage")
SUFFIXES = ("_bias", "_std", "_unbiased")  # of figures beside a metric's own
# Of metrics without features. "source" is an option that names the network.
OF_KINDS = {
    "caption_accuracy": CODE,
    "caption_variety": CODE,
    "hps": "HPS v2.1",
    "image_reward": "ImageReward v1.0",
    "label_accuracy": EXTRACTORS["digits"].network,
    "label_variety": CODE,
    "pick_score": "yuvalkirstain/PickScore_v1",
}
# Of the rewards that recipes name without a file.
OF_REWARDS = {
    "clip-score": CLIP_L_336[0],
    "hps-v2.1": OF_KINDS["hps"],
    "image-reward": OF_KINDS["image_reward"],
    "pick-score": OF_KINDS["pick_score"],
    **{f"shapes-{name}": EXTRACTORS["shapes"].network for name in Scene._fields},
}


def networks(protocol: str) -> dict[str, str]:
    """The network that reads images, by the metric's key in the protocol's file.

    It is empty for a protocol that is not in a file, such as a user's own metric.
    """
    path = spec.FOLDER / f"{protocol}.yaml"
    if not path.is_file():
        return {}
    metrics = spec.spec(path).metrics
    return {key: _network(options.get("kind", key), options) for key, options in metrics.items()}


def held_out(figures: Iterable[str], protocol: str, used: Collection[str]) -> dict[str, bool]:
    """Whether each figure is held out; those that no metric of the protocol's file gives are not in
    it.

    Args:
        used: The networks that training used.
    """
    table = networks(protocol)
    found = {figure: _metric_of(figure, table) for figure in figures}
    return {figure: table[key] not in used for figure, key in found.items() if key is not None}


def _network(kind: str, options: Mapping[str, object]) -> str:
    if "features" in options:
        return EXTRACTORS[str(options["features"])].network
    if kind == "lpips_diversity":
        return f"lpips-{options.get('trunk', 'vgg')}"
    return str(options["source"]) if "source" in options else OF_KINDS[kind]


def _metric_of(figure: str, table: Mapping[str, str]) -> str | None:
    """The metric's key in the protocol's file that gives a figure."""
    name = name_of(figure)
    if name in OF_PRDC:
        return "prdc" if "prdc" in table else None
    if name.endswith("accuracy"):
        return "accuracy" if "accuracy" in table else None
    stems = [name, *(name.removesuffix(s) for s in SUFFIXES)]
    return next((stem for stem in stems if stem in table), None)
