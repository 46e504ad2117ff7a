"""A protocol, written down: prompts, counts, sizes, reference and metrics, checked strictly.

Metrics are named with the arguments of their own constructors, so those are the schema.
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
from eval.metrics.features import EXTRACTORS, Named, Prepared
from eval.metrics.fid import FID, FIDInfinity
from eval.metrics.inception_score import InceptionScore, InceptionScoreInfinity
from eval.metrics.mmd import CMMD, KID
from eval.metrics.perceptual import Diversity, lpips
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
    """How often the digits classifier reads the digit that was asked for."""

    def read(samples: Samples) -> dict[str, float]:
        with torch.no_grad():
            logits = digits.classifier()(samples.images.float() / 127.5 - 1)
        wanted = torch.tensor([int(p) for p in samples.prompts])
        return {"accuracy": (logits.argmax(1) == wanted).double().mean().item()}

    return read


def caption_accuracy() -> Metric:
    """How often exact code reads the caption that was asked for, whole and by attribute."""
    return lambda samples: shapes.accuracy(samples.images, samples.prompts)


def lpips_diversity(
    trunk: str = "vgg", size: int = 512, name: str = "lpips_diversity"
) -> Diversity:
    """Diversity within a prompt, by LPIPS on a trunk."""
    return Diversity(lpips(trunk), size, name)


KINDS: dict[str, Callable[..., Metric]] = {
    "caption_accuracy": caption_accuracy,
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
    "lpips_diversity": lpips_diversity,
    "pick_score": PickScore,
    "prdc": PRDC,
    "vendi": Vendi,
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Digits(Strict):
    """The label of each of the embedded digits."""

    source: Literal["digits"]
    classes: ClassVar[int] = 10

    def read(self) -> list[str]:
        return [str(v) for v in digits.data()[1].tolist()]


class Shapes(Strict):
    """Every caption of the embedded shapes, `each` times."""

    source: Literal["shapes"]
    each: PositiveInt
    classes: ClassVar[int] = 0

    def read(self) -> list[str]:
        return shapes.all_captions() * self.each


class Labels(Strict):
    """Class labels in turn, `each` of every class, so that every chunk is balanced."""

    source: Literal["labels"]
    classes: PositiveInt
    each: PositiveInt

    def read(self) -> list[str]:
        return [str(i % self.classes) for i in range(self.classes * self.each)]


class Captions(Strict):
    """The lines of a text file in the cache."""

    source: Literal["captions"]
    file: str
    origin: str  # where its lines are from, for who has to make it
    classes: ClassVar[int] = 0

    def read(self) -> list[str]:
        path = fetch.cache() / "captions" / self.file
        if not path.is_file():
            raise MetricError(
                f"captions: {path} is missing; write it, one a line, from {self.origin}"
            )
        try:
            return lines(decoded(path.read_bytes()))
        except ValueError as error:
            raise MetricError(f"captions: {path} {error}") from None


class Against(Strict):
    """The real pictures: of the embedded sets, or by the name of their statistics."""

    name: str
    count: PositiveInt


class Need(NamedTuple):
    """What a protocol asks for of its real pictures.

    features: what is read of them.
    metric: what asks for it, in words.
    vectors: whether the features themselves are needed, and not their moments alone.
    side: of the pictures in pixels, where they must be of the samples' size.
    """

    features: Named
    metric: str
    vectors: bool
    side: int | None


class Spec(Strict):
    """A protocol as its file says it.

    summary: one line for the catalogue.
    count: of samples for one figure, and so of prompts.
    seeds: how many figures a mean is taken over.
    chunk: how many samples are drawn and held at a time.
    channels: of the samples.
    side: of the samples in pixels; none is asked for where they are brought to `size`.
    prepare, size: what happens to samples and real pictures alike before any network.
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
    reference: Against | None = None
    metrics: dict[str, dict[str, Any]]

    def all_prompts(self, name: str) -> list[str]:
        """As many prompts as the protocol counts.

        Raises:
            MetricError: its source has another number of them, or is missing.
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
            MetricError: one is not as its constructor takes it, or its reference is missing.
        """
        return tuple(self._metric(f"protocol {name}: {k}", k, v) for k, v in self.metrics.items())

    def _metric(self, where: str, name: str, options: dict[str, Any]) -> Metric:
        options = dict(options)
        make = self._kind(where, name, options)
        taken, hints = inspect.signature(make).parameters, hints_of(make)
        given: dict[str, Any] = {"name": name} if "name" in taken else {}
        if "features" in taken:
            given["features"] = self._features(where, options)
        if "reference" in taken:
            given["reference"] = self._reference(
                where, given["features"], hints["reference"], options.get("keep")
            )
        for key, value in options.items():
            if key not in taken or key in given:
                raise unknown(f"{where}: option", key, set(taken) - set(given))
            try:
                given[key] = TypeAdapter(hints[key]).validate_python(value, strict=True)
            except ValidationError as error:
                raise MetricError(f"{where}: {key}: {error.errors()[0]['msg']}") from error
        needed = [k for k, p in taken.items() if p.default is p.empty and k not in given]
        if needed:
            raise MetricError(f"{where}: it lacks {needed[0]}; add {needed[0]}: …")
        return make(**given)

    def needs(self, name: str) -> list[Need]:
        """What its metrics ask for of the real pictures, once for each kind of features.

        Raises:
            MetricError: a metric or its features are unknown.
        """
        found: dict[Named, Need] = {}
        for key, written in self.metrics.items():
            where, options = f"protocol {name}: {key}", dict(written)
            make = self._kind(where, key, options)
            if "reference" not in inspect.signature(make).parameters:
                continue
            features = self._features(where, options)
            vectors = hints_of(make)["reference"] is Tensor
            if features not in found or vectors > found[features].vectors:
                side = None if isinstance(features, Prepared) else self.side
                found[features] = Need(features, f"{key} of {name}", vectors, side)
        return list(found.values())

    def _kind(self, where: str, name: str, options: dict[str, Any]) -> Callable[..., Metric]:
        kind = options.pop("kind", name)
        if kind not in KINDS:
            raise unknown(f"{where}: kind", str(kind), KINDS)
        return KINDS[kind]

    def _features(self, where: str, options: dict[str, Any]) -> Named:
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
            return base  # a size is then no option: it would be without effect
        size = options.pop("size", self.size)
        if not isinstance(size, int):
            raise MetricError(f"{where}: {prepare} is to which size? add size: PIXELS")
        return Prepared(PREPARE[prepare], size, base)

    def _reference(self, where: str, features: Named, hint: Any, keep: Any) -> Any:
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
        found = reference.find(self.reference.name, features, self.reference.count)
        if hint is Tensor and not len(found.features):
            raise MetricError(
                f"{where}: the reference {found.name} holds moments alone, as published ones do; "
                f"make it from the pictures: distill reference {found.name} FOLDER"
            )
        return found.features if hint is Tensor else found.moments


def hints_of(make: Callable[..., Metric]) -> dict[str, Any]:
    """The types of a metric's arguments."""
    return get_type_hints(make.__init__ if inspect.isclass(make) else make)


@cache
def _shapes_drawn(n: int) -> Tensor:
    captions = shapes.all_captions()
    return shapes.draw(captions * (n // len(captions)), seed=1_000_000)


EMBEDDED: dict[str, Callable[[int], Tensor]] = {
    "digits": lambda n: to_uint8(digits.data()[0][:n]),
    "shapes": _shapes_drawn,
}


def names() -> list[str]:
    """Of all protocols that are written down."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def spec(path: Path) -> Spec:
    """The protocol in a file.

    Raises:
        MetricError: some key is missing, unknown or not of its type.
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
