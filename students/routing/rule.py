"""Which student a condition belongs to: by its label, or by the words of its prompt.

Needs nothing but the standard library: this file leaves with the students.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def first_place(prompt: str, words: Sequence[str]) -> int | None:
    """Where the first of the words or phrases, whole and in any case, stands in a prompt."""
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) for word in words]
    return min((match.start() for match in found if match), default=None)


def expert_of(condition: Any, rule: Mapping[str, Any]) -> int:
    """The number of the student that a label or a prompt belongs to.

    A prompt with words of several students belongs to the one whose word comes first.

    Args:
        rule: `by`, which is "labels" or "words", and `parts`: those of each student.

    Raises:
        ValueError: it belongs to none.
    """
    parts = rule["parts"]
    if rule["by"] == "labels":
        for number, labels in enumerate(parts):
            if int(condition) in labels:
                return number
        raise ValueError(f"no student has learned the label {condition!r}; the parts are {parts}")
    places = [first_place(str(condition), words) for words in parts]
    known = [(place, number) for number, place in enumerate(places) if place is not None]
    if not known:
        raise ValueError(
            f"no student has learned the prompt {condition!r}: it has no word of {parts}"
        )
    return min(known)[1]
