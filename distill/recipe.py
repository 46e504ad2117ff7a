"""Recipes: a run, written down. YAML in, checked objects out; a typo is an error, not a default."""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    field_validator,
)

from distill.explain import explain
from distill.objective import (
    Count,
    Finite,
    NonNegative,
    Objective,
    Positive,
    Seed,
    Share,
    Whole,
)
from distill.player import Moves
from students.critic import Critic
from students.generator import Generator
from students.lora import Adapter
from teachers.denoiser import Denoiser
from teachers.errors import UserError, nearest
from teachers.plugin import import_file
from teachers.quantised import FORMS, Precision

SHIPPED = Path(__file__).parent.parent / "recipes"
NETWORKS = (Denoiser, Generator, Critic)


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GuidanceSection(Section):
    """How the teacher is guided; see teachers/guidance.py."""

    scale: NonNegative  # g = 1 + w; 1 is none
    kind: Literal["cfg", "apg", "skip", "auto"] = "cfg"
    interval: tuple[NonNegative, NonNegative] | None = None  # of σ/α; guided only in it
    rescale: Share = 0.0  # of the way back to the unguided standard deviation
    eta: NonNegative | None = None  # apg: share of the parallel component; 0 by default
    threshold: Positive | None = None  # apg: the greatest norm of what is moved by
    blocks: tuple[str, ...] = ()  # skip: the blocks left out
    weaker: str | None = None  # auto: a teacher's source

    def agree(self, where: str) -> None:
        """Refuse keys of another kind of guidance, and the lack of those of this one."""
        own = {"eta": "apg", "threshold": "apg", "blocks": "skip", "weaker": "auto"}
        for key, kind in own.items():
            given = getattr(self, key) not in (None, ())
            if given and kind != self.kind:
                raise UserError(f"{where}: teacher.guidance.{key}: only kind {kind!r} has it")
            if not given and kind == self.kind and kind != "apg":
                raise UserError(f"{where}: teacher.guidance.{key}: kind {kind!r} needs it")
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise UserError(
                f"{where}: teacher.guidance.interval: low, {low:g}, is not below high, {high:g}"
            )


# A number is a scale. The tags' brackets mark them as no part of a key's path, for `explain`.
Guidance = Annotated[
    Annotated[NonNegative, Tag("[scale]")] | Annotated[GuidanceSection, Tag("[mapping]")],
    Discriminator(lambda v: "[mapping]" if isinstance(v, dict | GuidanceSection) else "[scale]"),
]


class TeacherSection(Section):
    """What is distilled."""

    source: str  # "digits", a diffusers folder, a Hub id, or "file.py:function"
    guidance: Guidance = 1.0  # g = 1 + w of classifier-free guidance, 1 is none; or a mapping
    null_label: Whole | None = None  # the class that means "no class", if there is one
    negative_prompt: str | None = None  # what guidance moves away from; by default ""
    size: Count | None = None  # of the pictures, in pixels; by default the checkpoint's own
    precision: Precision | None = None  # of the teacher's frozen weights
    frames: Count | None = None  # of videos
    embedded_guidance: Positive | None = None  # what FLUX.1-dev's network is told; by default 3.5
    vae: str | None = None  # the folder of EDM2's autoencoder, for pictures of its latents

    def options(self) -> dict[str, Any]:
        """What `teachers.load` is told, beside the source."""
        names = ("null_label", "negative_prompt", "size", "precision", "frames",
                 "embedded_guidance", "vae")  # fmt: skip
        return {k: v for k in names if (v := getattr(self, k)) is not None}


class StudentSection(Section):
    """What it becomes."""

    steps: Count = 1  # the most steps it is trained for; it also runs in those that divide them
    start: Positive | None = None  # σ/α it starts from; the teacher's highest
    renoise: bool = True  # return to the next time with fresh noise, or along the ODE


class AdaptersSection(Section):
    """That players are adapters on the teacher's own frozen weights, and of what shape."""

    players: tuple[str, ...] | None = None  # the others are full copies; by default there are none
    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    rank: Count = 64
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

    hf: str  # a Hub id, a folder, or a .parquet, .csv or .jsonl file
    column: str
    split: str = "train"


class Bucketing(Section):
    """Sizes of one area and several aspect ratios, of which each batch has one."""

    multiple: Count = 64  # of which every side is one
    ratio: Annotated[float, *Finite, Ge(1)] = 2.0  # of the longer side to the shorter, at most


# A text, or a mapping; the tags keep one's errors out of the other's.
Place = Annotated[
    Annotated[str, Tag("[text]")] | Annotated[Column, Tag("[column]")],
    Discriminator(lambda v: "[column]" if isinstance(v, dict | Column) else "[text]"),
]


class DataSection(Section):
    """Prompts, or real data for objectives that need them."""

    # "digits", a folder of images (for labels, a subfolder for each class), .tar shards, or
    # "DATASET:COLUMN"
    source: Place | None = None
    prompts: Place | None = None  # a text file, "pack:starter", or "DATASET:COLUMN"
    captions: str | None = None  # of images: "txt", "json:KEY", "folder", or a dataset's column
    size: Count | None = None  # pixels of a side; by default the teacher's
    buckets: Bucketing | None = None  # several aspect ratios of size × size's area; none: squares
    in_memory_gb: NonNegative = 4.0  # what is larger, once encoded, is read from a cache
    cache: str = "~/.cache/fewstep"  # the folder of all caches
    cache_limit_gb: NonNegative = 100.0  # of one
    skip_share: Share = 0.01  # of items that may be bad; with more, the run stops


class TrainSection(Section):
    """How long, how large, how often."""

    steps: Count
    batch: Count = 64  # samples per update, over all processes
    accumulate: Count = 1  # parts each batch is cut into; with more processes, one for each
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Share = 0.999  # decay of the student's average, which is what is exported; 0 for none
    seed: Seed = 0
    log_every: Count = 50
    save_every: Count = 500
    sample_every: Whole = 500  # and at the end; 0 for never
    keep: Count = 2  # checkpoints kept, beside the best
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside metrics.jsonl


# eval/protocols, which this package does not read; a test holds the two together
Known = Literal["digits", "shapes", "cifar10-50k", "imagenet64-50k", "coco2014-30k", "coco2017-5k",
                "sdxl-10k", "mjhq-30k"]  # fmt: skip


class EvalSection(Section):
    """What the run is measured by."""

    protocol: Known | None = None
    every: Whole = 0  # steps between evaluations while training; 0 for only at the end
    seeds: Count = 3  # over which the student's figures are averaged
    teacher_seeds: Whole = 1  # and the teacher's, which take longer; 0 leaves it out
    teacher_steps: Count = 18
    teacher_solver: Literal["heun", "ddim", "dpmpp_2m", "euler", "ancestral"] = "heun"


class ExportSection(Section):
    """What becomes of the student."""

    # Why it may be shared though its teacher's licence says no; the card repeats it.
    licence_override: str = ""


class Recipe(Section):
    """A run: `objective` is kept as its checked keys, to be built once the networks exist."""

    teacher: TeacherSection
    student: StudentSection = StudentSection()
    objective: dict[str, Any]
    adapters: AdaptersSection | None = None
    critic: CriticSection | None = None
    players: dict[str, Moves] = Field(default_factory=dict)
    data: DataSection = DataSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()

    @field_validator("teacher", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def kind(self) -> type[Objective]:
        """The objective's class."""
        return objective_class(self.objective["name"])

    def keys_schema(self) -> type[BaseModel]:
        """The checked form of the objective's hyper-parameters."""
        return schema_of(self.kind)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe and check all of it; nothing is built.

        Args:
            path: A YAML file, or the name of a shipped recipe such as "digits/dmd2".
            overrides: Dotted, as in "train.steps=100"; values are YAML.

        Raises:
            UserError: one line with the key path, what was expected, and the nearest valid name.
        """
        file = find(path)
        return cls.check(override(read_yaml(file), overrides), str(path))

    @classmethod
    def check(cls, tree: dict[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from a plain tree, every key and value of it checked."""
        try:
            recipe = cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, cls)}") from None
        keys = dict(recipe.objective)
        if not isinstance(name := keys.pop("name", None), str):
            raise UserError(f"{where}: objective.name is missing; {nearest('', _registry())}")
        kind = objective_class(name, where)
        schema = schema_of(kind)
        try:
            checked = schema.model_validate(keys).model_dump(mode="json")
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, schema, 'objective')}") from None
        recipe = recipe.model_copy(update={"objective": {"name": name, **checked}})
        recipe._agree(kind, where)
        return recipe

    def _agree(self, kind: type[Objective], where: str) -> None:
        """Refuse what each section allows but together cannot be."""
        roles = networks_of(kind)
        name = self.objective["name"]
        known = ["student", *(r for r in roles if r not in ("teacher", "student"))]
        for player in self.players:
            if player not in known:
                raise UserError(
                    f"{where}: players.{player}: {name} has no such player; "
                    f"{nearest(player, known)}"
                )
        adapted = () if self.adapters is None else self.adapters.players or ()
        copies = [k for k in known if k != "critic"]
        if self.adapters is not None and self.adapters.players == ():
            raise UserError(f"{where}: adapters.players: name one, or remove the section")
        for player in [p for p in adapted if p not in copies]:
            raise UserError(
                f"{where}: adapters.players: {name} has no such network as {player!r}; "
                f"{nearest(player, copies)}"
            )
        if self.teacher.precision in FORMS:
            self._agree_quantised([k for k in copies if k not in (adapted or copies)], where)
        if self.critic is not None and "critic" not in roles:
            raise UserError(f"{where}: critic: {name} has no critic; remove the section")
        if roles.get("critic") and self.critic is None:
            raise UserError(f"{where}: critic: {name} needs one; add the section 'critic: {{}}'")
        needs = kind.needs_data == "always" or (kind.needs_data == "critic" and self.critic)
        if needs and self.data.source is None:
            why = "its critic compares with" if kind.needs_data == "critic" else "it learns from"
            remedy = ", or remove the critic section" if not roles.get("critic") else ""
            remedy = remedy if kind.needs_data == "critic" else ""
            raise UserError(
                f"{where}: data.source is missing: {name} needs real data, which {why}; "
                f"set data.source to 'digits' or a folder of images{remedy}"
            )
        if isinstance(self.teacher.guidance, GuidanceSection):
            self.teacher.guidance.agree(where)

        if self.data.prompts is not None and self.data.source is not None:
            raise UserError(
                f"{where}: data.prompts: the images of data.source have captions of their own; "
                "remove one of the two"
            )
        if self.data.buckets is not None and self.data.source in (None, "digits"):
            raise UserError(f"{where}: data.buckets: there are no images to sort; remove it")
        if self.train.batch % self.train.accumulate:
            raise UserError(
                f"{where}: train.batch: {self.train.batch} does not divide into "
                f"train.accumulate = {self.train.accumulate} equal parts"
            )

    def _agree_quantised(self, whole: list[str], where: str) -> None:
        """Refuse quantised weights under what would have to change them.

        Args:
            whole: The networks that are copies of the teacher even with adapters.
        """
        key = f"{where}: teacher.precision: weights in {self.teacher.precision}"
        if self.adapters is None or not self.kind.few_step:
            raise UserError(f"{key} carry adapters and do not learn; add 'adapters: {{}}', or bf16")
        if whole:
            raise UserError(f"{key} do not learn, and {whole[0]} is a copy; name it in "
                            "adapters.players, or take bf16")  # fmt: skip
        if self.adapters.kind == "dora":
            raise UserError(f"{key} would be merged with other norms than DoRA learnt; "
                            "set adapters.kind to lora")  # fmt: skip

    def tree(self) -> dict[str, Any]:
        """Plain data that `check` reads back as this recipe, all defaults spelled out."""
        return self.model_dump(mode="json")


def find(path: str | Path) -> Path:
    """A recipe's file: the path itself, or else that of the shipped recipe of that name."""
    path = Path(path)
    name = Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    for candidate in (path, SHIPPED / name, (SHIPPED / name).with_suffix(".yaml")):
        if candidate.is_file():
            return candidate
    wanted = str(name.with_suffix(""))
    raise UserError(f"recipe {str(path)!r}: no such file; {nearest(wanted, shipped())}")


def shipped() -> list[str]:
    """The names of the recipes in the package, such as "digits/dmd2"."""
    return sorted(str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number, as everyone who writes it means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


# What the loader raises for text that is no YAML, or whose scalars are no values of their type.
BAD_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        tree = yaml.load(file.read_text(), _Loader)  # a SafeLoader: plain data only
    except BAD_YAML as error:
        raise UserError(f"recipe {file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {file}: expected a mapping of sections")
    return tree


def override(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The tree with each "a.b=value" set in it."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip(".") or key.startswith("-"):
            raise UserError(f"override {text!r}: expected key.path=value, as in train.steps=100")
        node: dict[str, Any] = tree
        *parents, leaf = key.split(".")
        for depth, parent in enumerate(parents):
            below: Any = node.get(parent)
            if parent == "teacher" and isinstance(below, str):
                below = {"source": below}
            if below is None:
                below = {}
            if not isinstance(below, dict):
                path = ".".join(parents[: depth + 1])
                raise UserError(f"override {text!r}: {path} is a value, not a section")
            node[parent] = below
            node = below
        try:
            node[leaf] = yaml.load(value, _Loader)
        except BAD_YAML:
            raise UserError(f"override {text!r}: {value!r} is not valid YAML") from None
    return tree


def _registry() -> dict[str, type[Objective]]:
    from distill.objectives import OBJECTIVES

    return OBJECTIVES


def objective_class(name: str, where: str = "recipe") -> type[Objective]:
    """An objective by its registered name, or as "module:Class" or "path/to/file.py:Class"."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in _registry():
            raise UserError(
                f"{where}: objective.name: {name!r} is unknown; {nearest(name, _registry())}"
            )
        return _registry()[name]
    try:
        module = (
            import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: objective.name: cannot import {place!r} ({reason})") from None
    kind = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(f"{where}: objective.name: {place} has no Objective named {attribute!r}")
    if "__dataclass_fields__" not in vars(kind):
        raise UserError(f"{where}: objective.name: {attribute} must be a @dataclass(kw_only=True)")
    try:
        schema_of(kind)
    except Exception as error:  # a hint that is no name, or a type that no YAML value has
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: objective.name: a field of {attribute}: {reason}") from None
    if "critic" in networks_of(kind) and "fake" not in networks_of(kind):
        raise UserError(f"{where}: objective.name: {attribute} has a critic but no field fake")
    return kind


def networks_of(kind: type[Objective]) -> dict[str, bool]:
    """The fields of an objective that are networks, and whether it cannot do without them."""
    found: dict[str, bool] = {}
    for name, hint in get_type_hints(kind).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if any(isinstance(o, type) and issubclass(o, NETWORKS) for o in options):
            found[name] = type(None) not in options
    return found


def schema_of(kind: type[Objective]) -> type[BaseModel]:
    """The hyper-parameters of an objective, which are its other fields, as a checked section."""
    hints, networks = get_type_hints(kind, include_extras=True), networks_of(kind)
    keys: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in networks or not f.init:
            continue
        if f.default_factory is not MISSING:
            default = Field(default_factory=f.default_factory)
        else:
            default = ... if f.default is MISSING else f.default
        keys[f.name] = (hints[f.name], default)
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **keys)
