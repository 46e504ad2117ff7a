"""Which exceptions are the user's mistakes, and the one line that each comes to."""

from __future__ import annotations

import errno
import sys
from typing import Any


def is_usage(error: Exception) -> str | None:
    """A wrong command line, as the parser words it, without most of what was long in it."""
    from teachers.errors import WORD, cut, shortened

    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, or typer's own
        at = getattr(error, "ctx", None)
        command = "" if at is None or at.parent is None else f" {at.info_name}"
        line: str = " ".join(error.format_message().split())  # pyright: ignore
        return f"{cut(shortened(line), WORD)} (see distill{command} --help)"
    return None


def said(error: Exception) -> str | None:
    """The message of an error that says how to put it right."""
    from teachers.errors import UserError, quoted, shortened

    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # none of ours is long
        return f"{quoted(error.filename)}: no file can have so long a name; give a shorter one"
    kinds: tuple[type, ...] = (UserError,)
    if (module := sys.modules.get("eval.errors")) is not None:
        kinds += (module.MetricError,)
    return shortened(str(error)) if isinstance(error, kinds) else None


def broken(error: Exception) -> str | None:
    """The message of an export that failed, which no change of the command puts right."""
    module: Any = sys.modules.get("students.export.folder")
    return str(error) if module is not None and isinstance(error, module.ExportError) else None


def stop_code(error: Exception) -> int | None:
    """128 plus the signal, for a run that a signal stopped in good order."""
    module: Any = sys.modules.get("distill.training.engine")
    if module is not None and isinstance(error, module.Stopped):
        sys.stderr.write(
            f"distill: {error}: the step was finished and saved; go on with --resume\n"
        )
        return 128 + error.number  # pyright: ignore[reportAttributeAccessIssue]
    return None
