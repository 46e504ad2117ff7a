"""Errors of a recipe in one line: the key's path, what was expected, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distill.objectives.noise_levels import Times
from teachers.errors import cut, nearest, plural, quoted


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first error as one line: key path, what was expected, the nearest valid name."""
    problems = [e for e in error.errors() if not _other_member(e, error.errors())]
    first = sorted(problems, key=lambda e: e["type"] not in UNKNOWN)[0]
    # The path of an error in a union holds the tag of the member that failed, which is no key.
    *parents, last = first["loc"] or ("[all]",)
    is_key = first["type"] in UNKNOWN or not _is_tag(last)  # an unknown key may look like a tag
    loc = [str(p) for p in parents if not _is_tag(p)] + [str(last)] * is_key
    path = ".".join(cut(part) for part in ([prefix, *loc] if prefix else loc))
    if first["type"] in UNKNOWN:
        known = _keys(model, loc[:-1])
        return f"{path}: unknown key; {nearest(loc[-1], known)}"
    if first["type"] == "missing":
        return f"{path}: missing; every recipe must set it"
    if first["type"] == "missing_argument":
        return f"{path}: missing; set it"
    expected = _expected(first)
    if expected.startswith("expected") and not isinstance(first["input"], dict):
        expected += f", not {quoted(first['input'])}"
    return f"{path}: {expected}"


UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _other_member(problem: ErrorDetails, problems: list[ErrorDetails]) -> bool:
    """Whether the error is of a union's member that lacks these keys, and another has them."""
    tags = [p for p in problem["loc"] if _is_tag(p)]
    lacking = {str(p["loc"][:-1]) for p in problems if p["type"] in UNKNOWN}
    lacks = str(problem["loc"][:-1]) in lacking
    return bool(tags) and lacks and any(str(p["loc"][:-1]) not in lacking for p in problems)


def _is_tag(part: int | str) -> bool:
    kinds = {kind.__name__ for kind in get_args(Times)}
    return isinstance(part, str) and (part in kinds or "[" in part)


def _expected(problem: ErrorDetails) -> str:
    """What was expected; for a check of our own, what is wrong."""
    context = problem.get("ctx", {})
    if problem["type"] == "too_short":
        least = context["min_length"]
        return f"expected at least {least} {plural(least, 'item')}"
    if problem["type"] == "string_too_short":
        return "empty; give it a value, or remove the key"
    if problem["type"] == "tuple_type":
        return "expected a list"
    if problem["type"] in ("model_type", "dict_type"):
        if problem["loc"] == ("eval",) and problem["input"] is None:
            return "to measure nothing, write eval: {protocol: null}"
        return "expected a section of keys"
    message = str(context["error"]) if problem["type"] == "value_error" else problem["msg"]
    message = message[0].lower() + message[1:]
    return message.replace("input should be", "expected").replace("input should have", "expected")


def _keys(model: type, path: Sequence[str]) -> list[str]:
    """The valid keys at `path` of a model or a dataclass."""
    for part in path:
        hints = get_type_hints(model, include_extras=False)
        hint = hints.get(part)
        if get_origin(hint) is dict:  # players: any name, then its OptimizerConfig
            model = get_args(hint)[1]
            continue
        if get_origin(hint) is tuple:  # rows: a number, then one row
            model = get_args(hint)[0]
            continue
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        options = [get_args(o)[0] if get_origin(o) is tuple else o for o in options]  # of a list
        inner = [o for o in options if isinstance(o, type) and hasattr(o, "__annotations__")]
        if inner:
            model = inner[0]
    return [k for k in get_type_hints(model) if not k.startswith(("model_", "_"))]
