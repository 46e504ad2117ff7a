"""What several commands take, and what they check of it."""

from __future__ import annotations

import os
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
    from teachers.errors import UserError
    from teachers.storage.files import new_mode

    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path} cannot be written")
        return
    try:  # some file systems, such as /proc, let all write and none create
        new_mode(path.parent)
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror}); give another folder"
        ) from None


def counts(generator: Generator) -> str:
    """The step counts that a student runs at: "1 step", or "1, 2 or 4 steps"."""
    from distill.publish.results_table import steps_of

    return steps_of(generator.counts)
