"""The one exception that means: the user can fix this."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake in what we were given. The message is one line: place, what is wrong, remedy.

    The command line prints it to stderr and exits with 2; any other exception is our own fault.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error line: the known name nearest to a wrong one, or all of them when none is."""
    known = sorted(known)
    close = get_close_matches(name, known, 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Name a file as damaged where what is read of it is missing or of another kind.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: damaged: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError):
        raise UserError(f"{path}: damaged; it is not as a run leaves it") from None


def clipped(value: object, most: int = 80) -> str:
    """What a user gave, as a message echoes it: one line of at most `most` characters.

    The middle is left out of longer ones, since the ends of paths and names tell most.
    """
    text = " ".join(str(value).split())
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def teacher_at(source: str) -> str:
    """Begins a message about the teacher that a user named."""
    return f"teacher {clipped(source)!r}"


def note(line: str) -> None:
    """What a user should know but need not act on: one line on stderr."""
    sys.stderr.write(f"distill: {line}\n")
