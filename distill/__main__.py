"""The command line: `distill COMMAND`; see `distill --help`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Any

import typer

from distill.commands import looking, measuring, sharing, training

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a pretrained diffusion or flow model into a one- to four-step generator.",
)

# In the order of --help: a run and what it draws, figures, sharing, and what comes before a run.
COMMANDS = {
    "run": training.run,
    "sample": measuring.sample,
    "eval": measuring.evaluate,
    "draw": measuring.draw,
    "reference": measuring.reference,
    "report": sharing.report,
    "compare": sharing.compare,
    "card": sharing.card,
    "push": sharing.push,
    "convert": sharing.convert,
    "doctor": looking.doctor,
    "plan": looking.plan,
    "cache": training.cache,
    "teach": training.teach,
    "bench": training.bench,
    "list": looking.listing,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


class Terminated(BaseException):
    """SIGTERM came outside of training, where there is no step to finish."""


def interrupt(number: int, frame: Any) -> None:
    raise Terminated


def main() -> None:
    """Exit codes: 0 done; 2 the user's mistake, in one line; 130/143 stopped; 1 anything else."""
    code = 1
    signal.signal(signal.SIGTERM, interrupt)
    if not sys.warnoptions:  # what our dependencies will change is no user's concern
        warnings.simplefilter("ignore", FutureWarning)
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(
            "distill: SIGINT: stopped; a run goes on with --resume, a benchmark by itself\n"
        )
        code = 128 + signal.SIGINT
    except Terminated:
        sys.stderr.write(
            "distill: SIGTERM: stopped; a run goes on with --resume, a benchmark by itself\n"
        )
        code = 128 + signal.SIGTERM
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
    finally:
        leave_group()
    sys.exit(code)


def code_of(error: Exception) -> int | None:
    """The exit code of an error that is not our own fault, having said it in one line."""
    from distill.mistakes import is_usage, said, stop_code

    if (stopped := stop_code(error)) is not None:
        return stopped
    line = is_usage(error) or said(error)
    if line is None:
        return None
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"distill: {' '.join(line.split())}\n")
    return 2


def leave_group() -> None:
    """An open process group at exit now and then aborts a rank."""
    if (torch := sys.modules.get("torch")) is not None:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
