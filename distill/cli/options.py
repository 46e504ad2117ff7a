"""What several commands take, and what they check of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from students.generator import Generator


def at_home(path: Path | None) -> Path | None:
    """A path of the command line, `~` and `~name` at its start replaced: shells leave some.

    Raises:
        UserError: there is no such user.
    """
    if path is None or not str(path).startswith("~"):
        return path
    from teachers.storage.files import home  # and with it torch

    return home(path)


RecipeArg = Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe: digits/dmd2.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Such as train.steps=500.")]
Out = Annotated[
    Path | None,
    typer.Option(callback=at_home, help="The run's folder.", show_default="runs/RECIPE"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
Licence = Annotated[
    str, typer.Option("--licence-override", help="Why it may be shared though its licence says no.")
]
Student = Annotated[
    Path, typer.Argument(callback=at_home, help="A run's folder, or the student folder in it.")
]
RunArg = Annotated[Path, typer.Argument(callback=at_home, help="A finished run's folder.")]


def writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before any work is done for it."""
    from distill.files import check_writable

    check_writable(path, option)


def counts(generator: Generator) -> str:
    """The step counts that a student runs at: "1 step", or "1, 2 or 4 steps"."""
    from distill.publish.results_table import steps_of

    return steps_of(generator.counts)
