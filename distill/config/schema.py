"""The sections of a recipe: their keys, the values that each takes, and the defaults.

The comment beside a key explains it to users.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval, Le, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Strict, Tag

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
from teachers.compiled import Mode
from teachers.denoiser import SharedTimes
from teachers.errors import UserError
from teachers.quantised import Precision

# A file, a folder or a name. It is never empty, because an empty path would mean the working
# directory; for no value, leave the key out.
Name = Annotated[str, MinLen(1)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors, and a section that is read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# A number is one scale; a pair is a range, from which each sample of a batch draws its own.
Scale = Annotated[
    Annotated[NonNegative, Tag("[scale]")]
    | Annotated[tuple[NonNegative, NonNegative], Tag("[range]")],
    Discriminator(lambda v: "[range]" if isinstance(v, list | tuple) else "[scale]"),
]


class GuidanceSection(Section):
    """Guidance of the teacher; see teachers/guidance.py."""

    # g = 1 + w of classifier-free guidance; 1 means no guidance. Or a range [low, high]: each
    # sample's own is drawn from it evenly, and the student reads it.
    scale: Scale
    # With a range: the scale that teacher and student are sampled at; by default its middle.
    sampling_scale: NonNegative | None = None
    # cfg: classifier-free guidance; apg: adaptive projected guidance; skip: guidance away from the
    # network with some blocks skipped; auto: away from a weaker network (autoguidance)
    kind: Literal["cfg", "apg", "skip", "auto"] = "cfg"
    interval: tuple[NonNegative, NonNegative] | None = None  # guided σ/α; by default all
    rescale: Fraction = 0.0  # return to the unguided standard deviation: 0 not at all, 1 fully
    eta: NonNegative | None = None  # apg: share kept of the component along x̂; by default 0
    threshold: Positive | None = None  # apg: largest norm of x̂ - negative; by default no limit
    channels: PositiveInt | None = None  # guided, the first of x̂; by default all
    blocks: tuple[str, ...] = ()  # skip: names of the blocks to skip
    weaker: Name | None = None  # auto: source of the weaker teacher

    @property
    def range(self) -> tuple[float, float] | None:
        """The scales that samples draw from in training; None where there is one scale."""
        return self.scale if isinstance(self.scale, tuple) else None

    @property
    def one_scale(self) -> float:
        """The scale, or of a range the one that samples are made with."""
        if not isinstance(self.scale, tuple):
            return self.scale
        return sum(self.scale) / 2 if self.sampling_scale is None else self.sampling_scale


# A number is a scale. `explain` drops tags, which it knows by their brackets, from a key's path.
Guidance = Annotated[
    Annotated[NonNegative, Tag("[scale]")] | Annotated[GuidanceSection, Tag("[mapping]")],
    Discriminator(lambda v: "[mapping]" if isinstance(v, dict | GuidanceSection) else "[scale]"),
]


# A number is a factor; a pair is that at t = 0 and that at t = 1.
Shift = Annotated[
    Annotated[Positive, Tag("[factor]")] | Annotated[tuple[Positive, Positive], Tag("[pair]")],
    Discriminator(lambda v: "[pair]" if isinstance(v, list | tuple) else "[factor]"),
]


class SharedTimesSection(Section):
    """Near t = 0 the network reads one time for each of a few intervals (arXiv:2306.11251)."""

    below: Annotated[Positive, Le(1)] = 0.1  # the intervals divide [0, below) of the process's t
    intervals: Annotated[NonNegativeInt, Le(1000)] = 5  # 0 shares nothing

    @property
    def shared(self) -> SharedTimes:
        return SharedTimes(self.below, self.intervals)


class AdapterFile(Section):
    """A LoRA file that becomes part of the teacher's frozen weights."""

    file: Name  # a .safetensors file
    strength: Annotated[float, *Finite] = 1.0  # what its change is multiplied by


class DiscriminatorSection(Section):
    """A discriminator whose gradient moves the teacher's x̂ towards data (arXiv:2211.17091)."""

    file: Name  # critic.safetensors, as `distill teach` leaves it, of this very teacher
    scale: NonNegative = 1.0  # w of its gradient; 0 is the teacher alone
    # σ/α where it acts, low < σ/α ≤ high; by default the levels that it was trained at.
    interval: tuple[NonNegative, NonNegative] | None = None
    boost: Positive = 1.0  # factor of the scale for samples that it takes for the teacher's


class TeacherSection(Section):
    """The model to distil."""

    source: Name  # "digits", a diffusers folder, a Hub id, or "file.py:function"
    guidance: Guidance = 1.0  # scale g = 1 + w, where 1 means no guidance; or a mapping
    discriminator: DiscriminatorSection | None = None  # it strengthens the model; by default none
    null_label: NonNegativeInt | None = None  # label for "no class"; by default none, or DiT's
    negative_prompt: str | None = None  # prompt that guidance moves away from; by default ""
    size: PositiveInt | None = None  # side of the images in pixels; by default the checkpoint's
    precision: Precision | None = None  # of the frozen weights; by default the checkpoint's
    frames: PositiveInt | None = None  # frames of a video; by default the checkpoint's
    embedded_guidance: Positive | None = None  # scale that FLUX dev networks read
    # The autoencoder of EDM2's latents, a folder; or of SiT, LightningDiT and U-ViT: a Hub id, a
    # folder, or VA-VAE's file.
    vae: Name | None = None
    config: Name | None = None  # single files: a folder or Hub id of the family; by default known
    variant: Name | None = None  # of a folder's weights, such as fp16; by default plain files
    # Factor of the noise levels σ/α, as of simple diffusion; of flows, instead of the scheduler's.
    shift: Shift | None = None
    interpolant: Literal["linear", "gvp"] | None = None  # SiT's path; by default its file's
    heads: PositiveInt | None = None  # attention heads of the three; by default as published
    adapters: tuple[AdapterFile, ...] | None = None  # LoRA files that become part of the model
    # Times that the network reads as one, of a network that was trained so; by default none.
    share_times: SharedTimesSection | None = None

    def options(self) -> dict[str, Any]:
        """The arguments of `teachers.load` after the source."""
        names = ("null_label", "negative_prompt", "size", "precision", "frames",
                 "embedded_guidance", "vae", "config", "variant", "shift", "interpolant",
                 "heads")  # fmt: skip
        given = {k: v for k in names if (v := getattr(self, k)) is not None}
        adapters = [entry.model_dump() for entry in self.adapters or ()]
        return {**given, "adapters": adapters} if adapters else given


class ArchitectureSection(Section):
    """A student's network: made of the teacher's, with its weights, or another one."""

    # Settings of the network's own config.json that become others, such as mid_block_type: null.
    config: dict[str, Any] = {}
    # Layers that are removed, by name; `distill compress` lists them with what each costs.
    remove: tuple[Name, ...] = ()
    # For the beginning of a name of the student's weights, that of the teacher's that they are.
    rename: dict[Name, Name] = {}
    # Whether weights that have no source, such as those of other widths, are drawn anew.
    fresh: bool = False
    # Layers of another form, by name: the form's `kind` and settings (docs/smaller.md).
    change: dict[Name, dict[str, Any]] = {}
    # Whether a UNet2DModel works on the Haar coefficients of its images, at half their side; its
    # first and last layers are then drawn anew.
    haar: bool = False
    noise: NonNegativeInt = 0  # of such a network: how many unit normals it draws and reads
    # With more than 1, one step is a chain of so many: the UNet's encoder runs once, and its
    # decoder at all of the chain's times at once (TiUE, arXiv:2505.21960).
    decoder_times: PositiveInt = 1
    # A network that is not made of the teacher's: "get", or "path/to/file.py:function", a function
    # of the teacher that returns a Network in its process. Then without the keys above.
    network: Name | None = None


class FormatSection(Section):
    """The numbers that a student is trained through, and leaves with."""

    # Bits of every weight, each output with a scale of its own; gradients pass straight through.
    weights: Annotated[int, Strict(), Interval(ge=2, le=8)]


class StudentSection(Section):
    """The few-step model to train."""

    steps: PositiveInt = 1  # steps of a sample: evaluations of the network
    # Step counts to train for: `steps` and divisors of it. With several, the longest chain gets
    # fewer updates: see docs/methods.md. By default only `steps`.
    counts: tuple[PositiveInt, ...] | None = None
    # Relative training frequency of each of `counts`. By default proportional to the count, so that
    # all steps of all chains are trained equally often.
    weights: tuple[Positive, ...] | None = None
    start: Positive | None = None  # σ/α of the first step; by default the teacher's highest
    # Between steps: add new noise (true), follow the ODE (false), or sample q(x_s | x_t, x̂), which
    # keeps a part of the noise ("posterior").
    renoise: bool | Literal["posterior"] = True
    # Of renoising: the share of the way to the next time that noise is added from, TCD's γ. By
    # default x̂ itself is renoised. Stock pipelines take it as `eta`.
    gamma: Fraction | None = None
    # Times near t = 0 that the network reads as one; by default the teacher's `share_times`. Its
    # steps must keep to other times, as stock pipelines pass each its own.
    share_times: SharedTimesSection | None = None
    # How the network of a flow map reads where its step lands: by an embedding that is added to
    # the time's and is 0 at first, or by a copy of the time's, a quarter of the two mixed.
    landing: Literal["added", "mixed"] | None = None  # by default added
    # What this student starts as: an earlier student (a run's folder, or an exported student), or a
    # smaller network that `distill compress` made. By default it starts as the teacher.
    init: Name | None = None
    architecture: ArchitectureSection | None = None  # by default the teacher's
    format: FormatSection | None = None  # by default floating point

    @property
    def network(self) -> str | None:
        """The network that is not made of the teacher's, if there is one."""
        return None if self.architecture is None else self.architecture.network

    def trained(self, learns: Learns, possible: Sequence[int]) -> dict[int, float]:
        """The relative training frequency of each count.

        Args:
            learns: The objective's `learns`.
            possible: The counts for which the student's scheduler has times.

        Raises:
            UserError: the scheduler has no times for one of `counts`.
        """
        if self.counts is None:
            counts = possible if learns == "all-times" else (self.steps,)
            return {k: float(k) for k in counts}
        if impossible := [k for k in self.counts if k not in possible]:
            count = impossible[0]
            raise UserError(
                f"student.counts: this student's scheduler has no times for {count} of "
                f"{self.steps} steps; remove it, or train a student of {count} steps"
            )
        return dict(sorted(zip(self.counts, self.weights or map(float, self.counts), strict=True)))


class AdaptersSection(Section):
    """Train networks as adapters on the frozen teacher, not as copies of it."""

    players: tuple[str, ...] | None = None  # networks that are adapters; by default all
    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"  # form of the adapter
    rank: PositiveInt = 64  # rank of its matrices
    alpha: Positive | None = None  # the adapter is scaled by alpha / rank; by default by 1
    targets: str | None = None  # regular expression of module names; by default the family's

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.kind, self.rank, self.alpha, self.targets)


class CriticSection(Section):
    """Train a critic (a discriminator) on features of the fake score; `{}` takes the defaults."""

    # Modules to take features from, each with a head of its own; by default a middle one.
    blocks: tuple[str, ...] | None = None
    # Whose features: the fake score's, which learn with the critic, the frozen teacher's, or the
    # student's own as they are in each step. By default the fake score's where there is one.
    reads: Literal["fake", "teacher", "student"] | None = None
    # Read a frozen network of images in place of fake score or teacher: "path/to/file.py:function",
    # which returns a torch module of images (B, C, H, W) in [-1, 1]. Its blocks are named
    # encoder.NAME; by default its own output is read. It sees no time and no condition.
    encoder: Name | None = None
    # What the encoder's weights are called, such as facebook/dinov2-large: figures that the same
    # network reads are then marked as not held out.
    network: Name | None = None
    # End each head in a unit vector with a loss of its own (SAN, arXiv:2301.12811).
    san: bool = False


class Column(Section):
    """A column of a dataset."""

    hf: Name  # Hub id, folder of a saved dataset, or a .parquet, .csv, .tsv, .json or .jsonl file
    column: Name  # name of the column
    split: Name = "train"  # split of a Hub or saved dataset


class Bucketing(Section):
    """Image sizes of equal area and several aspect ratios; each batch has one size."""

    multiple: PositiveInt = 64  # pixels; every side is a multiple of this
    # Largest ratio of the longer side to the shorter one.
    ratio: Annotated[float, *Finite, Interval(ge=1, le=100)] = 2.0


# A text or a mapping. By the tags, an error of one form does not mention the other.
Place = Annotated[
    Annotated[Name, Tag("[text]")] | Annotated[Column, Tag("[column]")],
    Discriminator(lambda v: "[column]" if isinstance(v, dict | Column) else "[text]"),
]


class CouplingSection(Section):
    """Which noise of a batch each datum gets, in place of any: shorter, straighter paths.

    Within a shard of a batch (`train.accumulate`), so that the number of processes does not matter.
    """

    # transport: the assignment of least squared distance (arXiv:2302.00482); immiscible: of least
    # distance in 16 bits, and nearest: the nearest of `candidates` new draws (both
    # arXiv:2406.12303). An assignment keeps the batch's noise as it is; nearest does not, and its
    # noise is a little smaller.
    kind: Literal["transport", "immiscible", "nearest"] = "transport"
    # nearest: draws for each datum, all of which are in memory at once.
    candidates: Annotated[PositiveInt, Ge(2), Le(1024)] = 4
    # Assign only among data of one class, if there are classes. Otherwise each class learns from
    # noise near its own data, and is sampled from other noise: on the digits, 2.5 instead of 0.34.
    by_label: bool = True


PAIRS = "pairs"  # the `data.source` of stored pairs
PairSolver = Literal["heun", "ddim", "dpmpp_2m", "euler"]  # the deterministic ones


class WhereSection(Section):
    """Which conditions of the data a run learns: those of one student of several."""

    labels: Annotated[list[NonNegativeInt], MinLen(1)] | None = None  # of a class-conditional model
    # Captions or prompts that have one of these words or phrases, whole and in any case.
    words: Annotated[list[Name], MinLen(1)] | None = None


class DataSection(Section):
    """Images with labels or captions, prompts only, or stored pairs of noise and sample."""

    # "digits", "shapes", a folder of images (with a subfolder for each class, if the teacher has
    # classes), .tar shards, or "DATASET:COLUMN"; or "pairs": noise and the sample that the guided
    # teacher makes of it. By default none.
    source: Place | None = None
    # Of pairs: their folder, as `distill pairs` makes it; where there is none yet, the run makes it
    # first. By default a folder in `cache`.
    path: Name | None = None
    count: PositiveInt | None = None  # of pairs to make; by default 8192
    solver: PairSolver | None = None  # of the teacher that makes them; by default heun
    steps: PositiveInt | None = None  # of that solver; by default 18
    inverted: NonNegativeInt | None = None  # further pairs: data, and the noise the ODE leads to
    images: Place | None = None  # the data of inverted pairs, as for `source`
    # States of the teacher's trajectory that each pair has, at times ((T - k) / T)², the last of
    # which is the sample: T, as many as the network of dsno has outputs. By default none.
    states: PositiveInt | None = None
    prompts: Place | None = None  # a text file, "pack:starter" (default), or "DATASET:COLUMN"
    # For teachers that edit a picture: the edited pictures, which objectives that need real data
    # learn from. A folder with a file of the same name for each image of `source`, or a column of
    # its table.
    targets: Name | None = None
    # For teachers that inpaint: masks, white where the image is painted anew; a folder or a column
    # as for `targets`. By default each image has a mask that is drawn at random.
    masks: Name | None = None
    # Captions of images: "txt" or "json:KEY" for files beside them, "folder" for the folder's name,
    # "metadata:COLUMN" for the folder's table, or a column of the dataset. By default a folder's
    # table if there is one, else .txt, else .json. Without `source`: a folder of .txt files, or a
    # text file, of 20 to 200 captions that are expanded into prompts; `prompts` are then neutral
    # ones, without the captions' trigger, that are mixed in.
    captions: Name | None = None
    # Share of the phrases of expanded captions that no prompt has, for tests and `train.guards`.
    held_out: Fraction = 0.2
    where: WhereSection | None = None  # the part of the conditions that is learned; by default all
    size: PositiveInt | None = None  # side of the images in pixels; by default the teacher's
    buckets: Bucketing | None = None  # several aspect ratios of one area; by default one size
    in_memory_gb: NonNegative = 4.0  # encoded data of more GB are read from a cache
    cache: Name = "~/.cache/fewstep"  # folder of all caches
    cache_limit_gb: NonNegative = 100.0  # largest size of one cache in GB
    coupling: CouplingSection | None = None  # of data and noise; by default independent
    skip_share: Fraction = 0.01  # share of items that may be bad; with more, the run stops


class GuardsSection(Section):
    """Checks during training of the student against its teacher, which may stop training early.

    The prompts are those with held-out phrases of `data.captions`; without it, the sample grids'.
    """

    every: PositiveInt = 50  # steps between checks
    start: NonNegativeInt = 0  # no check before this step
    # Training stops where a score falls below this share of its best so far, and the student of the
    # best check is exported; 0 means the score is only logged. A score of 1 is as good as the
    # teacher.
    diversity: Fraction = 0.9  # variety of a prompt's samples
    matching: Fraction = 0.9  # how near the distributions of a prompt's samples are
    nearest: Fraction = 0.9  # distance to the nearest of the pictures beside `data.captions`
    # How often the student's sample has the higher of the rewards that are `held_out`, of pairs
    # with the teacher's for the same prompt; 0.5 is as good as the teacher.
    held_out: Fraction = 0.9
    prompts: PositiveInt = 16  # number of prompts
    samples: Annotated[int, Strict(), Interval(ge=2, le=1000)] = 4  # of each prompt


# YAML reads a bare `off` as false.
Compile = Annotated[Mode, BeforeValidator(lambda v: "off" if v is False else v)]


# Below that of an even average over all steps, √(1/12).
Length = Annotated[Positive, Le(0.28)]


class TrainSection(Section):
    """Length, batch size, precision, and the intervals of logs and checkpoints."""

    steps: PositiveInt  # training steps
    batch: PositiveInt = 64  # samples of an update, over all processes
    accumulate: PositiveInt = 1  # parts of a batch, computed in turn; at least one for each process
    hours: Positive | None = None  # end training after so many hours, evaluations included
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the computation (autocast)
    ema: Fraction = 0.999  # decay of the student's average, which is exported; 0 means no average
    # Lengths of further averages, by a power of the time, as a share of the training, as EDM2's
    # [0.05, 0.1]. They are saved with each checkpoint, and give the average of any length later:
    # `distill average`. By default none.
    ema_lengths: tuple[Length, ...] | None = None
    seed: Seed = 0  # of all random numbers
    log_every: PositiveInt = 50  # steps between lines of metrics.jsonl
    save_every: PositiveInt = 500  # steps between checkpoints
    sample_every: NonNegativeInt = 500  # steps between image grids, and at the end; 0 means never
    guards: GuardsSection | None = None  # early stop; `{}` takes the defaults. By default none
    keep: PositiveInt = 2  # number of latest checkpoints to keep; the best is kept as well
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    # torch.compile on the networks' blocks one by one, on whole networks, or not at all (off). By
    # default blocks in runs of 2,000 steps or more on a GPU, and else off.
    compile: Compile | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside metrics.jsonl


# The names in eval/protocols, which a test compares with these: this package does not read them.
Known = Literal["digits", "shapes", "cifar10-50k", "imagenet64-50k", "coco2014-30k", "coco2017-5k",
                "sdxl-10k", "mjhq-30k"]  # fmt: skip


class FlatSection(Section):
    """When the evaluations in training have become flat; `{}` takes the defaults."""

    window: Annotated[PositiveInt, Ge(2)] = 5  # evaluations; their median is compared
    # The least improvement over the median of as many evaluations before, as a share of it.
    tolerance: Fraction = 0.02

    def reached(self, values: Sequence[float]) -> bool:
        """Whether the last evaluations are no better than those before them.

        Medians are compared, so that one outlier decides nothing.

        Args:
            values: Of the metric that training lowers, the oldest first.
        """
        n = self.window
        if len(values) < 2 * n:
            return False
        before, last = median(values[-2 * n : -n]), median(values[-n:])
        return before - last <= self.tolerance * abs(before)


class EvalSection(Section):
    """Measurements of the student and the teacher."""

    protocol: Known | None = None  # by default the run is not measured
    metric: Name | None = None  # "file.py:function", a metric of your own (docs/teachers.md)
    samples: PositiveInt = 256  # number of samples that `metric` is given
    every: NonNegativeInt = 0  # steps between evaluations in training; 0 means only at the end
    stop_when_flat: FlatSection | None = None  # end training when they improve no more
    seeds: PositiveInt = 3  # number of seeds that the student's results are averaged over
    teacher_seeds: NonNegativeInt = 1  # the same for the teacher; 0 means it is not measured
    teacher_steps: PositiveInt = 18  # solver steps of the teacher
    teacher_solver: Literal["heun", "ddim", "dpmpp_2m", "euler", "ancestral"] = "heun"


class RewardSection(Section):
    """A reward that the student's samples shall raise, or that only watches them."""

    # "file.py:function", which returns (B,) for images (B, C, H, W) in [-1, 1] and a list of B
    # prompts or labels; or a built-in one: pick-score, hps-v2.1, image-reward, clip-score, or
    # shapes, how sure a classifier is of the caption of the embedded shapes.
    function: Name
    weight: Positive = 1.0  # β: the loss has -β times the mean reward
    network: Name | None = None  # what its weights are called; as `critic.network`
    # direct adds the reward to the loss, by its gradient. weighted takes none: samples count more
    # in the loss the higher their reward, by softmax(β R / temperature). ranked takes that of a
    # small network, the player `ranking`, which learns to order samples as the reward does.
    kind: Literal["direct", "weighted", "ranked"] = "direct"
    temperature: Positive = 1.0  # of weighted and ranked, in the reward's own units
    # α of UniFL (arXiv:2404.05595): samples count by ReLU(α - r), so those above it are not pushed
    # further. By default there is none.
    floor: Annotated[float, *Finite] | None = None
    balance: bool = False  # not weighted: β is its gradient's length as a share of the loss's
    begins: NonNegativeInt = 0  # the first training step that it acts in
    warmup: NonNegativeInt = 0  # training steps in which its weight then rises linearly
    # No part of the loss: `train.guards` measures it, and ends training when it falls.
    held_out: bool = False


class ExportSection(Section):
    """Export of the student."""

    # Why the student may be shared although the teacher's licence forbids it; the card quotes it.
    licence_override: str = ""
