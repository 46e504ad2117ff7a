"""Parts of a run beside the student: each is tried alone, so that one failure stops no other."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.console import print_notice
from teachers.errors import WORD, cut, shortened

LOG = "failed.txt"  # in the run's folder: the traceback of every failure
FIGURES = "figures"  # the name of the measurement in `failed`
SELF_EXPLANATORY = ("UserError", "ExportError", "MetricError")  # shown without their class name


class Attempts:
    """Records which parts of a run failed.

    Attributes:
        failed: One line for each failed part, by the part's name; summary.json repeats it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.failed: dict[str, str] = {}

    def clear(self) -> None:
        """Forget all failures, and delete the log that an earlier attempt of this run left."""
        self.failed.clear()
        (self.out / LOG).unlink(missing_ok=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Try to make a part; an exception is recorded and not raised."""
        try:
            yield
        except Exception as error:
            self.record(name, error)

    def record(self, name: str, error: Exception) -> None:
        """Report a failure in one line on stderr; keep the line, and log the traceback."""
        line = one_line(error)
        if self.failed.get(name) != line:  # the same failure is reported once
            print_notice(f"{name}: failed: {line}")
        self.failed[name] = line
        append_traceback(self.out, name, error)


def one_line(error: BaseException) -> str:
    """The first line of an exception, after its class name unless it explains itself."""
    text = str(error).strip()
    first = cut(shortened(" ".join(text.partition("\n")[0].split())), 3 * WORD)
    kind = type(error).__name__
    return first if first and kind in SELF_EXPLANATORY else f"{kind}: {first}"


def append_traceback(out: Path, name: str, error: BaseException) -> None:
    """Append the traceback to the log in the run's folder, if the folder is writable."""
    try:
        with (out / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n{''.join(traceback.format_exception(error))}\n")
    except OSError:
        return
