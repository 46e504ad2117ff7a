"""The part of a source that `data.where` names: the conditions of one student of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.config.schema import WhereSection
from students.routing.rule import first_place
from teachers.errors import UserError, clipped

KEY = "data.where"


def places_of(prompts: Sequence[Any], where: WhereSection | None, classes: int) -> list[int]:
    """The places, in order, of the prompts or labels that belong to the part; all without one.

    Args:
        classes: Of the teacher; 0 if it has none.

    Raises:
        UserError: the prompts are no labels, or no text; or a label or word is of none of them.
    """
    if where is None:
        return list(range(len(prompts)))
    if where.labels is not None:
        _check_labels(prompts, where.labels, classes)
        return [i for i, prompt in enumerate(prompts) if is_inside(prompt, where)]
    assert where.words is not None  # a rule of recipes
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{KEY}.words: the data have no captions; {_remedy(classes)}")
    for word in where.words:
        if not any(first_place(prompt, [word]) is not None for prompt in prompts):
            raise UserError(
                f"{KEY}.words: {clipped(word)!r} is in no caption of the data; give words that "
                f"captions have, such as those of {clipped(prompts[0])!r}"
            )
    return [i for i, prompt in enumerate(prompts) if is_inside(prompt, where)]


def is_inside(prompt: Any, where: WhereSection) -> bool:
    """Whether a prompt or label belongs to the part."""
    if where.labels is not None:
        return prompt in where.labels
    return isinstance(prompt, str) and first_place(prompt, where.words or []) is not None


def _check_labels(prompts: Sequence[Any], labels: Sequence[int], classes: int) -> None:
    """Refuse labels that are no classes, or of which the prompts have none."""
    if not classes:
        raise UserError(f"{KEY}.labels: the teacher has no classes; {_remedy(classes)}")
    for label in labels:
        if label >= classes:
            raise UserError(
                f"{KEY}.labels: {label} is no class of the teacher; give some of 0 to {classes - 1}"
            )
        if label not in prompts:
            raise UserError(f"{KEY}.labels: {label}: the data have none of this class; remove it")


def _remedy(classes: int) -> str:
    """What a wrong kind of part can be replaced by."""
    return "give labels" if classes else "give words of captions, or remove it if there are none"
