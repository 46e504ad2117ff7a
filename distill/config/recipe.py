"""Recipes: a run, written down. YAML in, checked objects out; a typo is an error, not a default."""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from distill.config.errors import explain
from distill.config.optimizer import OptimizerConfig
from distill.config.renamed import current_key, current_names
from distill.config.schema import (
    AdaptersSection,
    CriticSection,
    DataSection,
    EvalSection,
    ExportSection,
    GuidanceSection,
    Section,
    StudentSection,
    TeacherSection,
    TrainSection,
)
from distill.objectives.base import Objective
from students.critic import Critic
from students.generator import Generator
from teachers.denoiser import Denoiser
from teachers.errors import UserError, cut, nearest, quoted
from teachers.quantised import FORMS
from teachers.storage.plugin import import_file
from teachers.text import first_line

SHIPPED = Path(__file__).parent.parent.parent / "recipes"
NETWORKS = (Denoiser, Generator, Critic)


class Recipe(Section):
    """A run: `objective` is kept as its checked keys, to be built once the networks exist."""

    teacher: TeacherSection
    student: StudentSection = StudentSection()
    objective: dict[str, Any]
    adapters: AdaptersSection | None = None
    critic: CriticSection | None = None
    players: dict[str, OptimizerConfig] = Field(default_factory=dict)
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
        tree = override(current_names(read_yaml(find(path))), overrides)
        if "rows" in tree and "objective" not in tree:
            raise UserError(f"{path}: it is a benchmark; distill bench runs it")
        return cls.check(tree, str(path))

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
                    f"{where}: players.{cut(player)}: {name} has no such player; "
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
        self.student.agree(kind.learns, where)
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
    if not path.name:
        raise UserError(
            f"recipe {str(path)!r}: give a file, or one of {', '.join(shipped()[:2])}, …"
        )
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
    """YAML whose numbers are those of YAML 1.2: 1e-4 is one; 010 and 1:30, octal and minutes, not.

    A key that comes twice is an error: one of the two would be lost.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted(k for k in set(keys) if k != "<<" and keys.count(k) > 1):
            raise yaml.YAMLError(f"key {twice[0]!r} comes twice{node.start_mark}")
        return super().construct_mapping(node, deep)


NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\d[\d_]*\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?"
    r"|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+.0123456789"))


# What the loader raises for text that is no YAML, or whose scalars are no values of their type.
BAD_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)  # a SafeLoader: plain data only
    except OSError as error:
        raise UserError(f"recipe {file}: it cannot be read ({error.strerror})") from None
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
            raise UserError(
                f"override {quoted(text)}: expected key.path=value, as in train.steps=100"
            )
        node: dict[str, Any] = tree
        *parents, leaf = current_key(key, tree).split(".")
        for depth, parent in enumerate(parents):
            below: Any = node.get(parent)
            if parent == "teacher" and isinstance(below, str):
                below = {"source": below}
            if below is None:
                below = {}
            if not isinstance(below, dict):
                path = ".".join(parents[: depth + 1])
                raise UserError(f"override {quoted(text)}: {cut(path)} is a value, not a section")
            node[parent] = below
            node = below
        try:
            node[leaf] = yaml.load(value, _Loader)
        except BAD_YAML:
            raise UserError(f"override {quoted(text)}: {quoted(value)} is not valid YAML") from None
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
                f"{where}: objective.name: {quoted(name)} is unknown; {nearest(name, _registry())}"
            )
        return _registry()[name]
    try:
        module = (
            import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except (Exception, SystemExit) as error:  # whatever a user's module raises while imported
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
        raise UserError(
            f"{where}: objective.name: a field of {attribute}: {first_line(error)}"
        ) from None
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
