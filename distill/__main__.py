"""The command line: `distill COMMAND`; see `distill --help`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from distill import __version__
from distill.cli import auto, compat, evaluate, inspect, publish, train, tune, weights
from distill.cli.errors import resume_hint

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"fewstep {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Distil a pretrained diffusion or flow model into a one- to four-step generator."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


# In the order of --help: training and sampling, measuring, publishing, and what comes before a run.
# Each with a summary short enough for one line of 80 columns.
COMMANDS = {
    "auto": (auto.auto, "Choose a recipe for a model and a card; run it on yes."),
    "run": (train.run, "Train a few-step student, export it and measure it."),
    "tune": (tune.tune, "Teach a student from pictures; keep its steps."),
    "sample": (evaluate.sample, "Generate images with a student."),
    "eval": (evaluate.evaluate, "Measure or time a student or a teacher."),
    "compat": (compat.compat, "Try LoRA files in a student and in its teacher."),
    "draw": (evaluate.draw, "Generate images for GenEval or DPG-Bench."),
    "reference": (evaluate.reference, "Compute the reference statistics of protocols."),
    "average": (weights.average, "Average a run's saved weights anew, or search."),
    "compress": (weights.compress, "Make a smaller network of a teacher's."),
    "quantise": (weights.quantise, "Round a student's weights to few bits."),
    "route": (weights.route, "Make one pipeline of students of parts."),
    "report": (publish.report, "Write the HTML report of a finished run."),
    "compare": (publish.compare, "Compare training curves with known-good runs."),
    "card": (publish.card, "Write the model card of a finished run."),
    "push": (publish.push, "Upload a finished run's student to the Hub."),
    "convert": (publish.convert, "Convert an EDM network or a student."),
    "wrap": (inspect.wrap, "Make a network of your own a teacher."),
    "show": (inspect.show, "Show how a few-step file is to be sampled."),
    "doctor": (inspect.doctor, "Check a teacher before training from it."),
    "plan": (inspect.plan, "Estimate a run's memory, time and cost."),
    "cache": (train.cache, "Encode prompts and images before training."),
    "pairs": (train.pairs, "Make pairs of noise and the teacher's sample."),
    "teach": (train.teach, "Train a small teacher from scratch."),
    "bench": (train.bench, "Compare objectives at one training budget."),
    "list": (inspect.listing, "List objectives, recipes, teachers and metrics."),
}
for name, (command, summary) in COMMANDS.items():
    app.command(name, short_help=summary)(command)


class Terminated(BaseException):
    """SIGTERM arrived outside training, where there is no step to finish."""


def raise_terminated(number: int, frame: Any) -> None:
    raise Terminated


def main() -> None:
    """Exit codes: 0 success; 2 an error the user can correct, as one line; 130 or 143 stopped by a
    signal; 1 anything else."""
    code = 1
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by a shell
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    signal.signal(signal.SIGTERM, raise_terminated)
    if not sys.warnoptions:  # users can do nothing about our dependencies' future changes
        warnings.simplefilter("ignore", FutureWarning)
    try:
        code = app(standalone_mode=False) or 0
        if code == 128 + signal.SIGINT:  # typer's newer versions make Ctrl-C an exit code
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(f"distill: SIGINT: stopped{resume_hint()}\n")
        code = 128 + signal.SIGINT
    except Terminated:
        sys.stderr.write(f"distill: SIGTERM: stopped{resume_hint()}\n")
        code = 128 + signal.SIGTERM
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
    finally:
        grouped = destroy_process_group()
    if grouped:
        exit_now(code)
    sys.exit(code)


def exit_code(error: Exception) -> int | None:
    """Print an expected error as one line and return its exit code; None for a bug of ours."""
    from distill.cli.errors import (
        export_error_line,
        shown,
        signal_exit_code,
        usage_line,
        user_error_line,
    )

    if (stopped := signal_exit_code(error)) is not None:
        return stopped
    line, code = usage_line(error) or user_error_line(error), 2
    if line is None:
        line, code = export_error_line(error), 1
    if line is None:
        return None
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"distill: {shown(line)}\n")
    return code


def destroy_process_group() -> bool:
    """Close torch's process group, and return whether there was one."""
    if (torch := sys.modules.get("torch")) is not None:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            return True
    return False


def exit_now(code: int) -> None:
    """End a process of a group with its exit code, after exit functions and flushed output.

    A usual exit destroys static objects while threads of the group may still run, which now and
    then aborts a rank that has done all its work.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
