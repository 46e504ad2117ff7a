"""The sections of a recipe: their keys, what values they take, and what is meant by none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen
from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from distill.field_types import (
    Finite,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Seed,
)
from distill.objectives.base import Learns
from students.lora import Adapter
from teachers.errors import UserError
from teachers.quantised import Precision

# Of a file, a folder or a name. An empty path would be the working directory, and an empty text is
# easily taken for none; leaving the key out says that.
Name = Annotated[str, MinLen(1)]


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GuidanceSection(Section):
    """How the teacher is guided; see teachers/guidance.py."""

    scale: NonNegative  # g = 1 + w; 1 is none
    kind: Literal["cfg", "apg", "skip", "auto"] = "cfg"
    interval: tuple[NonNegative, NonNegative] | None = None  # of σ/α; guided only in it
    rescale: Fraction = 0.0  # of the way back to the unguided standard deviation
    eta: NonNegative | None = None  # apg: share of the parallel component; 0 by default
    threshold: Positive | None = None  # apg: the greatest norm of what is moved by
    blocks: tuple[str, ...] = ()  # skip: the blocks left out
    weaker: Name | None = None  # auto: a teacher's source


# A number is a scale. The tags' brackets mark them as no part of a key's path, for `explain`.
Guidance = Annotated[
    Annotated[NonNegative, Tag("[scale]")] | Annotated[GuidanceSection, Tag("[mapping]")],
    Discriminator(lambda v: "[mapping]" if isinstance(v, dict | GuidanceSection) else "[scale]"),
]


class TeacherSection(Section):
    """What is distilled."""

    source: Name  # "digits", a diffusers folder, a Hub id, or "file.py:function"
    guidance: Guidance = 1.0  # g = 1 + w of classifier-free guidance, 1 is none; or a mapping
    null_label: NonNegativeInt | None = None  # the class that means "no class", if there is one
    negative_prompt: str | None = None  # what guidance moves away from; by default ""
    size: PositiveInt | None = None  # of the pictures, in pixels; by default the checkpoint's own
    precision: Precision | None = None  # of the teacher's frozen weights
    frames: PositiveInt | None = None  # of videos
    embedded_guidance: Positive | None = None  # what FLUX.1-dev's network is told; by default 3.5
    vae: Name | None = None  # the folder of EDM2's autoencoder, for pictures of its latents

    def options(self) -> dict[str, Any]:
        """What `teachers.load` is told, beside the source."""
        names = ("null_label", "negative_prompt", "size", "precision", "frames",
                 "embedded_guidance", "vae")  # fmt: skip
        return {k: v for k in names if (v := getattr(self, k)) is not None}


class StudentSection(Section):
    """What it becomes."""

    steps: PositiveInt = 1  # how many it takes
    # The step counts that it is trained for, where there are several: each divides `steps`, which
    # is one of them. Shorter chains cost the longest one its updates: see docs/methods.md.
    counts: tuple[PositiveInt, ...] | None = None
    # How often each of `counts` is trained; by default in proportion to its steps, so that every
    # place of every chain is trained equally often.
    weights: tuple[Positive, ...] | None = None
    start: Positive | None = None  # σ/α it starts from; the teacher's highest
    renoise: bool = True  # return to the next time with fresh noise, or along the ODE

    def trained(self, learns: Learns, possible: Sequence[int]) -> dict[int, float]:
        """How often each count is trained, relative to the others.

        Args:
            possible: The counts that the student's scheduler has times for.

        Raises:
            UserError: it has none for one of `counts`.
        """
        if self.counts is None:
            counts = possible if learns == "all-times" else (self.steps,)
            return {k: float(k) for k in counts}
        if lacks := [k for k in self.counts if k not in possible]:
            raise UserError(
                f"student.counts: this student's scheduler has no times for {lacks[0]} of "
                f"{self.steps} steps; remove it, or train a student of {lacks[0]} steps"
            )
        return dict(sorted(zip(self.counts, self.weights or map(float, self.counts), strict=True)))


class AdaptersSection(Section):
    """That players are adapters on the teacher's own frozen weights, and of what shape."""

    players: tuple[str, ...] | None = None  # the others are full copies; by default there are none
    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    rank: PositiveInt = 64
    alpha: Positive | None = None  # changes are scaled by alpha / rank; by default by 1
    targets: str | None = None  # a regex of module names; by default the family's own

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.kind, self.rank, self.alpha, self.targets)


class CriticSection(Section):
    """That there is a critic, and what it looks at."""

    blocks: tuple[str, ...] | None = None  # modules of the fake score; by default a middle one


class Column(Section):
    """A column of a dataset: of the Hub, of a folder that was saved, or of a table file."""

    hf: Name  # a Hub id, a folder, or a .parquet, .csv or .jsonl file
    column: Name
    split: Name = "train"


class Bucketing(Section):
    """Sizes of one area and several aspect ratios, of which each batch has one."""

    multiple: PositiveInt = 64  # of which every side is one
    # Of the longer side to the shorter, at most; no network draws longer strips than 100.
    ratio: Annotated[float, *Finite, Interval(ge=1, le=100)] = 2.0


# A text, or a mapping; the tags keep one's errors out of the other's.
Place = Annotated[
    Annotated[Name, Tag("[text]")] | Annotated[Column, Tag("[column]")],
    Discriminator(lambda v: "[column]" if isinstance(v, dict | Column) else "[text]"),
]


class DataSection(Section):
    """Prompts, or real data for objectives that need them."""

    # "digits", a folder of images (for labels, a subfolder for each class), .tar shards, or
    # "DATASET:COLUMN"
    source: Place | None = None
    prompts: Place | None = None  # a text file, "pack:starter", or "DATASET:COLUMN"
    captions: Name | None = None  # of images: "txt", "json:KEY", "folder", or a dataset's column
    size: PositiveInt | None = None  # pixels of a side; by default the teacher's
    buckets: Bucketing | None = None  # several aspect ratios of size × size's area; none: squares
    in_memory_gb: NonNegative = 4.0  # what is larger, once encoded, is read from a cache
    cache: Name = "~/.cache/fewstep"  # the folder of all caches
    cache_limit_gb: NonNegative = 100.0  # of one
    skip_share: Fraction = 0.01  # of items that may be bad; with more, the run stops


class TrainSection(Section):
    """How long, how large, how often."""

    steps: PositiveInt
    batch: PositiveInt = 64  # samples per update, over all processes
    accumulate: PositiveInt = 1  # parts each batch is cut into; with more processes, one for each
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Fraction = 0.999  # decay of the student's average, which is what is exported; 0 for none
    seed: Seed = 0
    log_every: PositiveInt = 50
    save_every: PositiveInt = 500
    sample_every: NonNegativeInt = 500  # and at the end; 0 for never
    keep: PositiveInt = 2  # checkpoints kept, beside the best
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside metrics.jsonl


# eval/protocols, which this package does not read; a test holds the two together
Known = Literal["digits", "shapes", "cifar10-50k", "imagenet64-50k", "coco2014-30k", "coco2017-5k",
                "sdxl-10k", "mjhq-30k"]  # fmt: skip


class EvalSection(Section):
    """What the run is measured by."""

    protocol: Known | None = None
    every: NonNegativeInt = 0  # steps between evaluations while training; 0 for only at the end
    seeds: PositiveInt = 3  # over which the student's figures are averaged
    teacher_seeds: NonNegativeInt = 1  # and the teacher's, which take longer; 0 leaves it out
    teacher_steps: PositiveInt = 18
    teacher_solver: Literal["heun", "ddim", "dpmpp_2m", "euler", "ancestral"] = "heun"


class ExportSection(Section):
    """What becomes of the student."""

    # Why it may be shared though its teacher's licence says no; the card repeats it.
    licence_override: str = ""
