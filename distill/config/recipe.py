"""Recipes: descriptions of runs in YAML, read into checked objects. A typo is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from distill.config.errors import explain
from distill.config.objective_schema import objective_class, registry, schema_of
from distill.config.optimizer import OptimizerConfig
from distill.config.paths import located
from distill.config.renamed import current_key, current_names
from distill.config.rules import broken_rule
from distill.config.schema import (
    AdaptersSection,
    CriticSection,
    DataSection,
    EvalSection,
    ExportSection,
    RewardSection,
    Section,
    StudentSection,
    TeacherSection,
    TrainSection,
)
from distill.objectives.base import Objective
from teachers.errors import UserError, cut, nearest, quoted

SHIPPED = Path(__file__).parent.parent.parent / "recipes"


class Recipe(Section):
    """A run. `objective` holds checked keys; the object is built when the networks exist."""

    teacher: TeacherSection
    student: StudentSection = StudentSection()
    objective: dict[str, Any]
    adapters: AdaptersSection | None = None
    critic: CriticSection | None = None
    rewards: dict[str, RewardSection] = Field(default_factory=dict)  # by names of one's own
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

    @property
    def needs_data(self) -> bool:
        """Whether batches must hold real data; if not, prompts or labels are enough."""
        needs = self.kind.needs_data
        return needs in ("always", "pairs") or (needs == "critic" and self.critic is not None)

    def keys_schema(self) -> type[BaseModel]:
        """The checked form of the objective's hyper-parameters."""
        return schema_of(self.kind)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe and check it completely; no network is built.

        Args:
            path: A YAML file, or the name of a shipped recipe such as "digits/dmd2". Relative
                paths in it are relative to its folder (distill/config/paths.py).
            overrides: Keys and YAML values, as in "train.steps=100". Relative paths in them are
                relative to the working folder.

        Raises:
            UserError: names the key path, what was expected, and the nearest valid name.
        """
        tree = current_names(override(read_recipe(path), overrides))
        if "rows" in tree and "objective" not in tree:
            raise UserError(f"{path}: it is a benchmark; run it with distill bench")
        return cls.check(tree, str(path))

    @classmethod
    def check(cls, tree: dict[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from plain data, with every key and value checked."""
        try:
            recipe = cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, cls)}") from None
        keys = dict(recipe.objective)
        if not isinstance(name := keys.pop("name", None), str):
            raise UserError(f"{where}: objective.name: missing; {nearest('', registry())}")
        kind = objective_class(name, where)
        schema = schema_of(kind)
        try:
            checked = schema.model_validate(keys).model_dump(mode="json")
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, schema, 'objective')}") from None
        recipe = recipe.model_copy(update={"objective": {"name": name, **checked}})
        if (message := broken_rule(recipe)) is not None:
            raise UserError(f"{where}: {message}")
        return recipe

    def tree(self) -> dict[str, Any]:
        """Plain data that `check` reads as this recipe, with all defaults written out."""
        return self.model_dump(mode="json")


def find(path: str | Path) -> Path:
    """A recipe's file: the path, or else the file of the shipped recipe with that name."""
    path = Path(path)
    if not path.name:
        raise UserError(
            f"recipe {str(path)!r}: it names no file; give one, or a shipped recipe: "
            f"{', '.join(shipped()[:2])}, …"
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
    """YAML with the numbers of YAML 1.2: 1e-4 is a number; 010 (octal) and 1:30 (minutes) are not.

    A key that comes twice is an error, because one of its values would be lost.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := sorted(k for k in set(keys) if k != "<<" and keys.count(k) > 1):
            raise yaml.YAMLError(f"key {repeated[0]!r} comes twice{node.start_mark}")
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


# What the loader raises for text that is not YAML, or a scalar that does not fit its type.
BAD_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)  # a SafeLoader: plain data only
    except OSError as error:
        raise UserError(f"recipe {file}: it cannot be read ({error.strerror}); check it") from None
    except BAD_YAML as error:
        raise UserError(
            f"recipe {file}: not valid YAML: {' '.join(str(error).split())}; correct it"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {file}: expected a mapping of sections")
    return tree


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The unchecked tree of a recipe, with the keys of today and the paths beside its file.

    Args:
        path: As for `Recipe.load`.
    """
    file = find(path)
    return located(current_names(read_yaml(file)), file)


def override(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The tree, changed in place, with each "a.b=value" set."""
    given: dict[str, str] = {}  # the keys as the user wrote them, by their names of today
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip(".") or key.startswith("-"):
            raise UserError(
                f"override {quoted(text)}: expected key.path=value, as in train.steps=100"
            )
        if not value.strip():  # YAML reads an empty text as null
            remedy = "write null after the =, or \"''\" for empty text"
            raise UserError(f"override {quoted(text)}: no value; {remedy}")
        node: dict[str, Any] = tree
        current = current_key(key, tree)
        if given.setdefault(current, key) != key:
            raise UserError(
                f"override {quoted(text)}: {given[current]} and {key} are one key; remove one"
            )
        *parents, leaf = current.split(".")
        for depth, parent in enumerate(parents):
            below: Any = node.get(parent)
            if parent == "teacher" and isinstance(below, str):
                below = {"source": below}
            if below is None:
                below = {}
            if not isinstance(below, dict):
                path = ".".join(parents[: depth + 1])
                raise UserError(
                    f"override {quoted(text)}: {cut(path)} is a value, not a section; "
                    "set it as a whole"
                )
            node[parent] = below
            node = below
        try:
            node[leaf] = yaml.load(value, _Loader)
        except BAD_YAML:
            raise UserError(
                f"override {quoted(text)}: {quoted(value)} is not valid YAML; quote it"
            ) from None
    return tree
