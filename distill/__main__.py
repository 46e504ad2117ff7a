"""The command line: `distill COMMAND`; see `distill --help`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from distill import __version__
from distill.cli import evaluate, inspect, publish, train

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"fewstep {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Distil a pretrained diffusion or flow model into a one- to four-step generator."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


# In the order of --help: a run and what it draws, figures, sharing, and what comes before a run.
# Each with what fits into its line there.
COMMANDS = {
    "run": (train.run, "Distil a student, export it and measure it."),
    "sample": (evaluate.sample, "Draw pictures from a student."),
    "eval": (evaluate.evaluate, "Measure a student or a teacher, or its speed."),
    "draw": (evaluate.draw, "Draw GenEval's or DPG-Bench's prompts."),
    "reference": (evaluate.reference, "Make what protocols compare with."),
    "report": (publish.report, "Write the page of a finished run."),
    "compare": (publish.compare, "Compare a run's curves with known-good ones."),
    "card": (publish.card, "Write the model card of a finished run."),
    "push": (publish.push, "Upload a finished run's student to the Hub."),
    "convert": (publish.convert, "Turn a network or a student into other files."),
    "doctor": (inspect.doctor, "Examine a teacher before money is spent on it."),
    "plan": (inspect.plan, "Say what a run would take: memory and time."),
    "cache": (train.cache, "Encode prompts and images once, beforehand."),
    "teach": (train.teach, "Train a small teacher from nothing."),
    "bench": (train.bench, "Race objectives at one budget."),
    "list": (inspect.listing, "Name what there is: objectives, recipes, …"),
}
for name, (command, line) in COMMANDS.items():
    app.command(name, short_help=line)(command)


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
        sys.stderr.write(f"distill: SIGINT: stopped{afterwards()}\n")
        code = 128 + signal.SIGINT
    except Terminated:
        sys.stderr.write(f"distill: SIGTERM: stopped{afterwards()}\n")
        code = 128 + signal.SIGTERM
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
    finally:
        leave_group()
    sys.exit(code)


def afterwards() -> str:
    """How the command that was stopped goes on."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command in ("run", "teach"):
        return "; go on with --resume"
    return "; the same command goes on" if command in ("bench", "cache") else ""


def code_of(error: Exception) -> int | None:
    """The exit code of an error that is not our own fault, having said it in one line."""
    from distill.cli.errors import broken, is_usage, said, stop_code

    if (stopped := stop_code(error)) is not None:
        return stopped
    line, code = is_usage(error) or said(error), 2
    if line is None:
        line, code = broken(error), 1
    if line is None:
        return None
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"distill: {' '.join(line.split())}\n")
    return code


def leave_group() -> None:
    """An open process group at exit now and then aborts a rank."""
    if (torch := sys.modules.get("torch")) is not None:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
