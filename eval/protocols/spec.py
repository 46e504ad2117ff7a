"""The schema of a protocol's YAML file: prompts, counts, sizes, reference and metrics.

A metric's options are the arguments of its constructor, so the constructors are their schema.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints

import torch
import yaml
from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from eval import digits, fetch, shapes
from eval.errors import MetricError, unknown
from eval.metrics.base import Metric
from eval.metrics.clip import ClipScore, PickScore
from eval.metrics.features import EXTRACTORS, NamedFeatures, Prepared
from eval.metrics.fid import FID, FIDInfinity
from eval.metrics.inception_score import InceptionScore, InceptionScoreInfinity
from eval.metrics.mmd import CMMD, KID
from eval.metrics.perceptual import Diversity, Variety, lpips
from eval.metrics.prdc import PRDC
from eval.metrics.rewards import HPS, ImageReward
from eval.metrics.vendi import Vendi
from eval.protocols import reference
from eval.resize import centre_lanczos, centre_patch, untouched
from eval.samples import Samples, to_uint8
from eval.text import decoded, lines

FOLDER = Path(__file__).parent
PREPARE = {f.__name__: f for f in (untouched, centre_lanczos, centre_patch)}
PositiveInt = Annotated[int, Ge(1)]


def label_accuracy() -> Metric:
    """The share of samples that the digits classifier reads as their label."""

    def accuracy(samples: Samples) -> dict[str, float]:
        with torch.no_grad():
            logits = digits.classifier()(samples.images.float() / 127.5 - 1)
        labels = torch.tensor([int(p) for p in samples.prompts])
        return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}

    return accuracy


def caption_accuracy() -> Metric:
    """The share of samples that exact code reads as their caption, and by each attribute."""
    return lambda samples: shapes.accuracy(samples.images, samples.prompts)


def lpips_diversity(
    trunk: str = "vgg", size: int = 512, name: str = "lpips_diversity"
) -> Diversity:
    """Diversity within a prompt, by LPIPS with a trunk."""
    return Diversity(lpips(trunk), size, name)


def pixels(images: Tensor) -> Tensor:
    """Images as they are, (N, D) from 0 to 1.

    A classifier's features of the pictures that it learned from hardly vary within a label, and
    every other picture, bad ones above all, would seem varied.
    """
    return images.flatten(1).float() / 255


def label_variety() -> Variety:
    """Variety of pixels within a label, as a share of the embedded digits'."""
    images, labels = digits.data()
    return Variety(pixels, Samples(to_uint8(images), [str(v) for v in labels.tolist()]))


def caption_variety(each: PositiveInt = 8) -> Variety:
    """Variety of pixels within a caption, as a share of that of `each` drawings of it."""
    prompts = shapes.all_captions() * each
    return Variety(pixels, Samples(shapes.draw(prompts, seed=0), prompts))


def known_words_accuracy() -> Metric:
    """As `caption_accuracy`; a caption may have words that the grammar lacks."""
    return lambda samples: shapes.known_words_accuracy(samples.images, samples.prompts)


KINDS: dict[str, Callable[..., Metric]] = {
    "caption_accuracy": caption_accuracy,
    "caption_variety": caption_variety,
    "clip_score": ClipScore,
    "cmmd": CMMD,
    "frechet": FID,
    "frechet_infinity": FIDInfinity,
    "hps": HPS,
    "image_reward": ImageReward,
    "inception_score": InceptionScore,
    "inception_score_infinity": InceptionScoreInfinity,
    "kid": KID,
    "label_accuracy": label_accuracy,
    "label_variety": label_variety,
    "lpips_diversity": lpips_diversity,
    "pick_score": PickScore,
    "prdc": PRDC,
    "vendi": Vendi,
}


# Metrics of an image and its prompt alone, and the one that takes prompts beyond the protocol's.
PROMPT_SCORES = dict.fromkeys(
    ("clip_score", "hps", "image_reward", "label_accuracy", "pick_score")
) | {"caption_accuracy": known_words_accuracy}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Digits(Strict):
    """The labels of all embedded digits."""

    source: Literal["digits"]
    classes: ClassVar[int] = 10

    def read(self) -> list[str]:
        return [str(v) for v in digits.data()[1].tolist()]


class Shapes(Strict):
    """All captions of the embedded shapes, `each` times."""

    source: Literal["shapes"]
    each: PositiveInt
    classes: ClassVar[int] = 0

    def read(self) -> list[str]:
        return shapes.all_captions() * self.each


class Labels(Strict):
    """Class labels in turn, `each` of every class, so every chunk is balanced."""

    source: Literal["labels"]
    classes: PositiveInt
    each: PositiveInt

    def read(self) -> list[str]:
        return [str(i % self.classes) for i in range(self.classes * self.each)]


class Captions(Strict):
    """The lines of a text file in the cache."""

    source: Literal["captions"]
    file: str
    origin: str  # the source of its lines, named in the error for a missing file
    classes: ClassVar[int] = 0

    def read(self) -> list[str]:
        path = fetch.cache() / "captions" / self.file
        if not path.is_file():
            raise MetricError(
                f"captions: {path} is missing; write it, one caption a line, from {self.origin}"
            )
        try:
            return lines(decoded(path.read_bytes()))
        except ValueError as error:
            raise MetricError(f"captions: {path} {error}") from None


class ReferenceSet(Strict):
    """The real images: an embedded set, or the name of a set with statistics."""

    name: str
    count: PositiveInt


class FeatureRequest(NamedTuple):
    """Features of the real images that a protocol needs.

    features: the extractor.
    metric: the metric and the protocol that need them, in one text.
    vectors: whether the feature vectors are needed, not the moments alone.
    side: the side that the images must have in pixels; None for any.
    """

    features: NamedFeatures
    metric: str
    vectors: bool
    side: int | None


class Spec(Strict):
    """The content of a protocol's file.

    summary: one line for the list of protocols.
    count: the number of samples for one figure, and of prompts.
    seeds: the number of seeds that figures are averaged over.
    chunk: the number of samples in memory at a time.
    channels: the samples' number of channels.
    side: the samples' side in pixels; None for any, for example where they are resized to `size`.
    prepare, size: the crop or resize of samples and of real images before any network.
    """

    summary: str
    prompts: Annotated[Digits | Shapes | Labels | Captions, Field(discriminator="source")]
    count: PositiveInt
    seeds: PositiveInt
    chunk: PositiveInt
    channels: PositiveInt = 3
    side: PositiveInt | None = None
    prepare: Literal["untouched", "centre_lanczos", "centre_patch"] = "untouched"
    size: PositiveInt | None = None
    reference: ReferenceSet | None = None
    metrics: dict[str, dict[str, Any]]

    def all_prompts(self, name: str) -> list[str]:
        """The prompts, `count` of them.

        Raises:
            MetricError: their source has another number, or is missing.
        """
        prompts = self.prompts.read()
        if len(prompts) != self.count:
            raise MetricError(
                f"protocol {name}: its prompts are {len(prompts)}; it takes {self.count}"
            )
        return prompts

    def all_metrics(self, name: str) -> tuple[Metric, ...]:
        """The metrics with their references.

        Raises:
            MetricError: a metric's options are not valid, or its reference is missing.
        """
        return tuple(self._metric(f"protocol {name}: {k}", k, v) for k, v in self.metrics.items())

    def _metric(self, where: str, name: str, options: dict[str, Any]) -> Metric:
        options = dict(options)
        constructor = self._kind(where, name, options)
        parameters, hints = inspect.signature(constructor).parameters, hints_of(constructor)
        arguments: dict[str, Any] = {"name": name} if "name" in parameters else {}
        if "features" in parameters:
            arguments["features"] = self._features(where, options)
        if "reference" in parameters:
            arguments["reference"] = self._reference(
                where, arguments["features"], hints["reference"], options.get("keep")
            )
        for key, value in options.items():
            if key not in parameters or key in arguments:
                raise unknown(f"{where}: option", key, set(parameters) - set(arguments))
            try:
                arguments[key] = TypeAdapter(hints[key]).validate_python(value, strict=True)
            except ValidationError as error:
                raise MetricError(f"{where}: {key}: {error.errors()[0]['msg']}") from error
        required = [k for k, p in parameters.items() if p.default is p.empty]
        if lacking := [k for k in required if k not in arguments]:
            raise MetricError(f"{where}: it lacks {lacking[0]}; add {lacking[0]}: …")
        return constructor(**arguments)

    def feature_requests(self, name: str) -> list[FeatureRequest]:
        """The features of the real images that its metrics need, each once.

        Raises:
            MetricError: a metric or its features are unknown.
        """
        requests: dict[NamedFeatures, FeatureRequest] = {}
        for key, written in self.metrics.items():
            where, options = f"protocol {name}: {key}", dict(written)
            constructor = self._kind(where, key, options)
            if "reference" not in inspect.signature(constructor).parameters:
                continue
            features = self._features(where, options)
            vectors = hints_of(constructor)["reference"] is Tensor
            if features not in requests or vectors > requests[features].vectors:
                side = None if isinstance(features, Prepared) else self.side
                requests[features] = FeatureRequest(features, f"{key} of {name}", vectors, side)
        return list(requests.values())

    def prompt_score(self, name: str) -> Metric | None:
        """The first metric of an image and its prompt alone, for any prompts; None without one.

        Raises:
            MetricError: its options are not valid.
        """
        for key, options in self.metrics.items():
            kind = options.get("kind", key)
            if kind in PROMPT_SCORES:
                instead = PROMPT_SCORES[kind]
                return instead() if instead else self._metric(f"{name}: {key}", key, options)
        return None

    def _kind(self, where: str, name: str, options: dict[str, Any]) -> Callable[..., Metric]:
        kind = options.pop("kind", name)
        if kind not in KINDS:
            raise unknown(f"{where}: kind", str(kind), KINDS)
        return KINDS[kind]

    def _features(self, where: str, options: dict[str, Any]) -> NamedFeatures:
        if "features" not in options:
            raise MetricError(f"{where}: no features are named; add features: NAME")
        chosen = str(options.pop("features"))
        if chosen not in EXTRACTORS:
            raise unknown(f"{where}: features", chosen, EXTRACTORS)
        base = EXTRACTORS[chosen]
        prepare = options.pop("prepare", self.prepare)
        if prepare not in PREPARE:
            raise unknown(f"{where}: prepare", str(prepare), PREPARE)
        if prepare == "untouched":
            return (
                base  # then `size` stays in the options and is refused, as it would have no effect
            )
        size = options.pop("size", self.size)
        if not isinstance(size, int):
            raise MetricError(f"{where}: {prepare} needs a size; add size: PIXELS")
        return Prepared(PREPARE[prepare], size, base)

    def _reference(self, where: str, features: NamedFeatures, hint: Any, keep: Any) -> Any:
        if self.reference is None:
            raise MetricError(f"{where}: it needs a reference; add reference: {{name, count}}")
        if self.reference.name in EMBEDDED:
            images = EMBEDDED[self.reference.name](self.reference.count)
            if len(images) != self.reference.count:
                raise MetricError(
                    f"{where}: the embedded {self.reference.name} are {len(images)}; "
                    f"the reference says {self.reference.count}"
                )
            return images[:keep] if isinstance(keep, int) else images
        statistics = reference.find(self.reference.name, features, self.reference.count)
        if hint is Tensor and not len(statistics.features):
            raise MetricError(
                f"{where}: the reference {statistics.name} holds moments alone, as published ones "
                f"do; make it from the images: distill reference {statistics.name} FOLDER"
            )
        return statistics.features if hint is Tensor else statistics.moments


def hints_of(constructor: Callable[..., Metric]) -> dict[str, Any]:
    """The types of a metric's arguments."""
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    return get_type_hints(function)


@cache
def _shapes(n: int) -> Tensor:
    captions = shapes.all_captions()
    return shapes.draw(captions * (n // len(captions)), seed=1_000_000)


EMBEDDED: dict[str, Callable[[int], Tensor]] = {
    "digits": lambda n: to_uint8(digits.data()[0][:n]),
    "shapes": _shapes,
}


def names() -> list[str]:
    """The names of all protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def spec(path: Path) -> Spec:
    """The content of a protocol's file.

    Raises:
        MetricError: a key is missing, unknown or of a wrong type.
    """
    try:
        return Spec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise MetricError(f"protocol {path.stem}: not YAML: {line}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise MetricError(f"protocol {path.stem}: {key}: {first['msg']}") from error
