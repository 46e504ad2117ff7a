"""The one exception that means: the user can fix this."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path

QUOTED = 80  # characters of a user's value that a message repeats
WORD = 200  # and of a name without blanks, such as a path
# Text in quotes, but not between two apostrophes of the prose: "a teacher's", "students'".
LONG = f"{{{QUOTED},}}"
IN_QUOTES = re.compile(
    rf"""(?<!\w)(?:'(?P<one>(?:[^'\\]|\\.){LONG})'|"(?P<two>(?:[^"\\]|\\.){LONG})")(?!\w)"""
)
LONG_WORD = re.compile(rf"\S{{{WORD + 1},}}")
# The parts of a message: a colon with a blank ends one, but not within a quoted value.
# The first may be a recipe's file or the name of a shipped one, and the second a key in it.
PART = re.compile(r"""((?>(?<!\w)'[^']*'(?!\w)|(?<!\w)"[^"]*"(?!\w)|.)+?): """, re.DOTALL)
RECIPE = re.compile(r"recipe\b.*|.*\.ya?ml|[\w-]+(/[\w-]+)+", re.DOTALL)
RECIPE_KEY = re.compile(r"[a-z]\w*(\.[^\s/]+)*")


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: place, what is wrong, remedy.

    The command line prints it to stderr and exits with 2; any other exception is a fault of the
    program. Of a long value a message repeats the two ends alone: see `shortened`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))

    @property
    def key(self) -> str:
        """The place that the message names: its text before the first ": " outside quotes.

        It is a key of the recipe ("data.source"), an option without its value ("--steps" of
        "--steps 3: …"), a path, or a kind of thing and its name ("teacher 'digits'"). Where a
        recipe's file comes first and a key in it second, the place is the key. Programs and tests
        compare this; the rest of the message is for people, and its wording may change.
        """
        message = str(self)
        first = PART.match(message)
        if first is None:
            return ""
        if first[1].startswith("--"):
            return first[1].partition(" ")[0]
        second = PART.match(message, first.end())
        if second and RECIPE.fullmatch(first[1]) and RECIPE_KEY.fullmatch(second[1]):
            return second[1]
        return first[1]


def cut(text: str, most: int = QUOTED) -> str:
    """The text, or its two ends where it has more than `most` characters."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 1]}…{text[-end:]}"


def clipped(value: object, most: int = QUOTED) -> str:
    """A user's value for a message, without quotes: on one line, and cut if it is long."""
    return cut(" ".join(str(value).split()), most)


def quoted(value: object, most: int = QUOTED) -> str:
    """A user's value for a message, in quotes: its repr, or the two ends of a long one."""
    return cut(repr(value), most)


def shortened(message: str) -> str:
    """A message with every long value cut: text in quotes, and words longer than prose has."""

    def cut_quotes(match: re.Match[str]) -> str:
        mark = match[0][0]
        return f"{mark}{cut(match['one'] or match['two'])}{mark}"

    message = IN_QUOTES.sub(cut_quotes, message)
    return LONG_WORD.sub(lambda match: cut(match[0], WORD), message)


NAMES = 300  # letters of known names in an error line


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the known name nearest to a wrong one, or the names if none is.

    Of very many, those that do not fit in a line's `NAMES` letters are counted.
    """
    name, known = name[:WORD], sorted(known)
    if close := get_close_matches(name, known, 1, 0.6):
        return f"did you mean {close[0]!r}?"
    shown = len(known)
    while shown > 1 and len(", ".join(known[:shown])) > NAMES:
        shown -= 1
    more = f" and {len(known) - shown} more" if shown < len(known) else ""
    return f"known: {', '.join(known[:shown])}{more}"


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Refuse a file in which something that is read in this context is missing or malformed.

    Raises:
        UserError: naming the file as damaged.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: damaged; it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise UserError(f"{path}: damaged; it is not as a run leaves it") from None


def teacher_at(source: str) -> str:
    """The beginning of a message about the teacher that a user named."""
    return f"teacher {clipped(source)!r}"


def printable(text: str) -> str:
    """Text for a terminal: the control characters in names of a stranger's file are replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def note(line: str) -> None:
    """One line on stderr that a user should know but need not act on."""
    before = BEFORE.get()
    if WRITTEN.get() and (before is None or line not in before):
        sys.stderr.write(f"distill: {printable(line)}\n")
        if before is not None:
            before.add(line)


WRITTEN = ContextVar("WRITTEN", default=True)  # whether notes are written
# The notes that are not written again; None: every note is written.
BEFORE: ContextVar[set[str] | None] = ContextVar("BEFORE", default=None)


@contextmanager
def without_notes() -> Iterator[None]:
    """Within it, no notes are written, for a command that loads one model several times."""
    before = WRITTEN.set(False)
    try:
        yield
    finally:
        WRITTEN.reset(before)


@contextmanager
def notes_once() -> Iterator[None]:
    """Within it, each note is written once, for a command whose runs load the same files."""
    token = BEFORE.set(set())
    try:
        yield
    finally:
        BEFORE.reset(token)


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, or the error's class where it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def plural(count: int, noun: str) -> str:
    """The noun for this count: step for 1, steps for 0, 2 and more."""
    return noun if count == 1 else f"{noun}s"
