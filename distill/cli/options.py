"""Arguments and options that several commands share, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from students.generator import Generator


def expand_home(path: Path | None) -> Path | None:
    """Replace `~` and `~name` at the start of a path, which some shells pass on unchanged.

    Raises:
        UserError: there is no such user.
    """
    if path is None or not str(path).startswith("~"):
        return path
    from teachers.storage.files import home  # imports torch

    return home(path)


RecipeArg = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a shipped recipe, such as digits/dmd2.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe keys to change, as KEY=VALUE, such as train.steps=500."),
]
Out = Annotated[
    Path | None,
    typer.Option(callback=expand_home, help="The run's folder.", show_default="runs/RECIPE"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]
Licence = Annotated[
    str,
    typer.Option(
        "--licence-override",
        help="Why the student may be shared although the teacher's licence forbids it.",
    ),
]
Student = Annotated[
    Path, typer.Argument(callback=expand_home, help="A run's folder, or a student folder.")
]
RunArg = Annotated[Path, typer.Argument(callback=expand_home, help="A finished run's folder.")]


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the command does any work."""
    from distill.files import check_writable as check

    check(path, option)


def step_counts(generator: Generator) -> str:
    """The step counts that a student runs at: "1 step", or "1, 2 or 4 steps"."""
    from distill.publish.results_table import steps_of

    return steps_of(generator.counts)
