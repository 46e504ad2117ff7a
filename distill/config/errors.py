"""What is wrong with a recipe, in one line: the key's path, what was expected, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from teachers.errors import cut, nearest, quoted
from teachers.text import plural


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first thing wrong, as one line: key path, what was expected, the nearest valid name."""
    problems = [e for e in error.errors() if not _other_member(e, error.errors())]
    first = sorted(problems, key=lambda e: e["type"] not in UNKNOWN)[0]
    # a union reports each member that failed; the path up to its tag is the key itself
    *parents, last = first["loc"] or ("[all]",)  # an unknown key may look like a tag
    named = first["type"] in UNKNOWN or not _is_tag(last)
    loc = [str(p) for p in parents if not _is_tag(p)] + [str(last)] * named
    path = ".".join(cut(part) for part in ([prefix, *loc] if prefix else loc))
    if first["type"] in UNKNOWN:
        known = _keys(model, loc[:-1])
        return f"{path}: unknown key; {nearest(loc[-1], known)}"
    if first["type"] == "missing":
        return f"{path}: missing; every recipe must set it"
    if first["type"] == "missing_argument":
        return f"{path}: missing"
    expected = _expected(first)
    shown = expected.startswith("expected") and not isinstance(first["input"], dict)
    given = f", not {quoted(first['input'])}" * shown
    return f"{path}: {expected}{given}"


UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _other_member(problem: ErrorDetails, problems: list[ErrorDetails]) -> bool:
    """Whether this is of a union's member that does not know the keys, where another does."""
    tags = [p for p in problem["loc"] if _is_tag(p)]
    strange = {str(p["loc"][:-1]) for p in problems if p["type"] in UNKNOWN}
    mine = any(str(problem["loc"][:-1]) == s for s in strange)
    return bool(tags) and mine and any(str(p["loc"][:-1]) not in strange for p in problems)


def _is_tag(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("Uniform", "LogNormal") or "[" in part)


def _expected(problem: ErrorDetails) -> str:
    """What should have been there; or, in a check of our own, what is wrong."""
    context = problem.get("ctx", {})
    if problem["type"] == "too_short":
        least = context["min_length"]
        return f"expected at least {least} {plural(least, 'item')}"
    if problem["type"] == "string_too_short":
        return "empty; give it a value, or remove the key"
    if problem["type"] == "tuple_type":
        return "expected a list"
    if problem["type"] in ("model_type", "dict_type"):
        return "expected a section of keys"
    message = str(context["error"]) if problem["type"] == "value_error" else problem["msg"]
    message = message[0].lower() + message[1:]
    return message.replace("input should be", "expected").replace("input should have", "expected")


def _keys(model: type, path: Sequence[str]) -> list[str]:
    """The keys that are valid under `path` of a model or a dataclass."""
    for part in path:
        hints = get_type_hints(model, include_extras=False)
        hint = hints.get(part)
        if get_origin(hint) is dict:  # players: any name, then Moves
            model = get_args(hint)[1]
            continue
        if get_origin(hint) is tuple:  # rows: each of one kind, under its number
            model = get_args(hint)[0]
            continue
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        inner = [o for o in options if isinstance(o, type) and hasattr(o, "__annotations__")]
        if inner:
            model = inner[0]
    return [k for k in get_type_hints(model) if not k.startswith(("model_", "_"))]
