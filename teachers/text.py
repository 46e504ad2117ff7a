"""Words of messages: the first line of an error, a noun in the plural."""

from __future__ import annotations


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, or the error's class where it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def plural(count: int, noun: str) -> str:
    """The noun for so many: step for 1, steps for 0, 2 and more."""
    return noun if count == 1 else f"{noun}s"
