"""What a run leaves beside its student: each tried by itself, so that none costs another."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.console import notice
from teachers.errors import WORD, cut, shortened

LOG = "failed.txt"  # in the run's folder: the traceback of everything that failed
FIGURES = "figures"  # the measuring, by its name in `failed`
WORDED = ("UserError", "ExportError", "MetricError")  # say by themselves what is wrong


class Attempts:
    """Keeps what failed.

    Attributes:
        failed: One line for each part that failed, by the part's name; summary.json repeats it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.failed: dict[str, str] = {}

    def forget(self) -> None:
        """Begin with nothing failed, and without what an earlier try of this run left."""
        self.failed.clear()
        (self.out / LOG).unlink(missing_ok=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Try to make a part; an exception is noted and goes no further."""
        try:
            yield
        except Exception as error:
            self.note(name, error)

    def note(self, name: str, error: Exception) -> None:
        """Say that a part failed, in one line on stderr, and keep the line and the traceback."""
        line = line_of(error)
        if self.failed.get(name) != line:  # what fails again in the same way is said once
            notice(f"{name}: failed: {line}")
        self.failed[name] = line
        log(self.out, name, error)


def line_of(error: BaseException) -> str:
    """An exception as one line: its first, with its kind where the line says little."""
    text = str(error).strip()
    first = cut(shortened(" ".join(text.partition("\n")[0].split())), 3 * WORD)
    kind = type(error).__name__
    return first if first and kind in WORDED else f"{kind}: {first}"


def log(out: Path, name: str, error: BaseException) -> None:
    """Add the traceback to the run's folder, where it can be written to."""
    try:
        with (out / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n{''.join(traceback.format_exception(error))}\n")
    except OSError:
        return
