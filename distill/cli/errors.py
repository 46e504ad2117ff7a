"""Errors that the user can correct, each as one line and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any


def usage_line(error: Exception) -> str | None:
    """The parser's message about a wrong command line, with long words cut; None for others."""
    from teachers.errors import WORD, cut, shortened

    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's or typer's
        context = getattr(error, "ctx", None)
        command = "" if context is None or context.parent is None else f" {context.info_name}"
        line: str = " ".join(error.format_message().split())  # pyright: ignore
        return f"{cut(shortened(line), WORD)} (see distill{command} --help)"
    return None


def user_error_line(error: Exception) -> str | None:
    """The message of an error that says what to correct; None for other errors."""
    from teachers.errors import UserError, quoted, shortened

    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{quoted(error.filename)}: no file can have so long a name; give a shorter one"
    kinds: tuple[type, ...] = (UserError,)
    if (module := sys.modules.get("eval.errors")) is not None:
        kinds += (module.MetricError,)
    return shortened(str(error)) if isinstance(error, kinds) else None


def export_error_line(error: Exception) -> str | None:
    """The message of a failed export, which the user cannot correct; None for other errors."""
    module: Any = sys.modules.get("students.export.folder")
    return str(error) if module is not None and isinstance(error, module.ExportError) else None


def signal_exit_code(error: Exception) -> int | None:
    """128 plus the signal's number, if a signal stopped training after a whole step."""
    module: Any = sys.modules.get("distill.training.engine")
    if module is not None and isinstance(error, module.Stopped):
        stopped: Any = error
        done = "the last step is finished and saved"
        if not stopped.saved:
            done = "stopped while compiling; what follows the last checkpoint is lost"
        advice = resume_hint(True) or "; distill run RECIPE --resume continues"  # RECIPE is auto's
        sys.stderr.write(f"distill: {error}: {done}{advice}\n")
        return 128 + stopped.number
    return None


def shown(line: str) -> str:
    """A message for the terminal: on one line, without control characters of a stranger's file."""
    from teachers.errors import printable

    return printable(" ".join(line.split()))


def begun() -> bool:
    """Whether this process has begun a run, which then has a folder."""
    module: Any = sys.modules.get("distill.training.run_folder")
    return module is not None and module.holding()


def resume_hint(saved: bool = False) -> str:
    """How to continue the command that was stopped; empty where nothing is kept.

    Args:
        saved: Whether a run is known to have begun.
    """
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command == "run" and not (saved or begun()):
        return " before the run began; nothing was written"
    if command in ("run", "teach", "tune"):
        return "; add --resume to continue"
    if command in ("average", "bench", "cache", "pairs"):
        return "; run the same command again to continue"
    return ""
