"""Which exceptions are the user's mistakes, and the one line that each comes to."""

from __future__ import annotations

import sys
from typing import Any


def is_usage(error: Exception) -> str | None:
    """A wrong command line, as the parser words it."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, or typer's own
        at = getattr(error, "ctx", None)
        command = "" if at is None or at.parent is None else f" {at.info_name}"
        return f"{error.format_message()} (see distill{command} --help)"  # pyright: ignore
    return None


def said(error: Exception) -> str | None:
    """The message of an error that says how to put it right."""
    from teachers.errors import UserError

    kinds: tuple[type, ...] = (UserError,)
    if (module := sys.modules.get("eval.errors")) is not None:
        kinds += (module.MetricError,)
    return str(error) if isinstance(error, kinds) else None


def stop_code(error: Exception) -> int | None:
    """128 plus the signal, for a run that a signal stopped in good order."""
    module: Any = sys.modules.get("distill.engine")
    if module is not None and isinstance(error, module.Stopped):
        sys.stderr.write(
            f"distill: {error}: the step was finished and saved; go on with --resume\n"
        )
        return 128 + error.number  # pyright: ignore[reportAttributeAccessIssue]
    return None
