"""Which of a component's weights are read: the plain files, or a variant such as fp16."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from teachers.errors import UserError, clipped, note

# A weights file as diffusers and transformers name it, with its shard and variant, if any.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d{5}-of-\d{5})?\.safetensors"
)
_ASKED: ContextVar[str | None] = ContextVar("variant", default=None)


@contextmanager
def reading(variant: str | None) -> Iterator[None]:
    """Read this variant of every component that has it, within the context."""
    token = _ASKED.set(variant)
    try:
        yield
    finally:
        _ASKED.reset(token)


def held(names: Iterable[str]) -> set[str | None]:
    """The variants that there are among file names; None stands for plain files."""
    return {m["variant"] for name in names if (m := WEIGHTS.fullmatch(name))}


def variant_of(names: Iterable[str]) -> str | None:
    """The variant of a component's weights to read; None for plain files, or if there are none.

    It is the one that was asked for, else plain files, else fp16, bf16 or another.

    Args:
        names: File names in the component's folder.
    """
    choices, usual = held(names), ("fp16", "bf16")
    if (asked := _ASKED.get()) in choices:
        return asked
    named = [v for v in choices if v is not None]
    if len(named) < len(choices) or not named:
        return None
    return min(named, key=lambda v: (usual.index(v) if v in usual else 9, v))


def check_asked(where: str, names: Iterable[str]) -> None:
    """Refuse a variant that no component has.

    Args:
        names: Of all files of all components.

    Raises:
        UserError: there are weights, and none of the variant that was asked for.
    """
    asked, choices = _ASKED.get(), held(names)
    if asked is None or not choices or asked in choices:
        return
    there = ", ".join(sorted("plain files" if v is None else v for v in choices))
    raise UserError(
        f"teacher.variant: {clipped(where)} has no *.{clipped(asked)}.safetensors; it has {there}; "
        "remove variant, or name one of these"
    )


def variants(who: str, folders: dict[str, Path]) -> dict[str, str | None]:
    """The variant to read of each component; prints a notice where it is not the expected one."""
    files = {part: [p.name for p in at.iterdir()] for part, at in folders.items()}
    choices = {part: variant_of(names) for part, names in files.items()}
    asked = _ASKED.get()
    for variant in sorted({v for v in choices.values() if v not in (None, asked)}, key=str):
        parts = ", ".join(part for part, v in choices.items() if v == variant and part)
        note(
            f"{who}: there are no weights{f' of {parts}' * bool(parts)} but *.{variant}.safetensors"
            ", and those are read"
        )
    plain = [k for k, v in choices.items() if v is None and held(files[k])]
    if asked is not None and plain:
        parts = f" of {', '.join(plain)}" * bool(plain[0])
        note(f"{who}: there are no {asked} weights{parts}, and plain ones are read")
    return choices
