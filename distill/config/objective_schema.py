"""An objective by its name, and its fields as keys of a recipe."""

from __future__ import annotations

import importlib
import types
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from distill.objectives.base import Auxiliary, Objective
from students.critic import Critic
from students.generator import Generator
from teachers.denoiser import Denoiser
from teachers.errors import UserError, nearest, quoted
from teachers.storage.plugin import import_file

NETWORKS = (Denoiser, Generator, Critic, Auxiliary)  # the types of an objective's networks


def registry() -> dict[str, type[Objective]]:
    """The objectives that a recipe can name, imported on first use."""
    from distill.config.objectives import OBJECTIVES

    return OBJECTIVES


def objective_class(name: str, where: str = "recipe") -> type[Objective]:
    """An objective by its registered name, or as "module:Class" or "path/to/file.py:Class".

    Raises:
        UserError: there is no such objective, or its class cannot be a recipe's objective.
    """
    module_name, colon, class_name = name.rpartition(":")
    if not colon:
        if name not in registry():
            raise UserError(
                f"{where}: objective.name: {quoted(name)} is unknown; {nearest(name, registry())}"
            )
        return registry()[name]
    kind = getattr(_imported(module_name, where), class_name, None)
    key = f"{where}: objective.name"
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(
            f"{key}: {module_name} has no Objective named {class_name!r}; name a subclass of "
            "distill.objective.Objective that is defined there"
        )
    if "__dataclass_fields__" not in vars(kind):
        raise UserError(f"{key}: {class_name} must be a dataclass; add @dataclass(kw_only=True)")
    try:
        schema_of(kind)
    except Exception as error:  # an unknown name in a type hint, or a type that YAML cannot hold
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: a field of {class_name}: {reason}; correct its type") from None
    return kind


def _imported(module_name: str, where: str) -> Any:
    """The module of a user's objective: a file, or a name on Python's path."""
    try:
        if module_name.endswith(".py"):
            return import_file(Path(module_name))
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module can raise anything while imported
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{where}: objective.name: cannot import {module_name!r} ({reason}); write "
            "path/to/file.py:Class or module:Class"
        ) from None


def networks_of(kind: type[Objective]) -> dict[str, bool]:
    """The fields of an objective that are networks, and whether each is required."""
    hints = _hints(kind)
    return {name: type(None) not in _options(hints[name]) for name in network_types(kind)}


def network_types(
    kind: type[Objective], base: type | tuple[type, ...] = NETWORKS
) -> dict[str, type]:
    """The fields of an objective that are networks, and the type of each.

    Args:
        base: Only fields of this type.
    """
    types_of = {
        name: next((o for o in _options(hint) if isinstance(o, type) and issubclass(o, base)), None)
        for name, hint in _hints(kind).items()
    }
    return {name: network for name, network in types_of.items() if network is not None}


@cache  # a recipe is checked by dozens of rules, and to resolve a class's hints takes milliseconds
def _hints(kind: type[Objective]) -> dict[str, Any]:
    """The types of an objective's fields."""
    return get_type_hints(kind)


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@cache
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
