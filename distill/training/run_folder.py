"""A run's folder: whether a run may begin or go on in it, and its lock: one process at a time.

The lock is the kernel's (`flock` on a hidden file), so that it ends with the process however that
ends, a SIGKILL included. It belongs to the process: who holds a folder may take it again.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import yaml

from distill.config.compare import differences
from distill.config.recipe import Recipe, read_yaml
from distill.config.renamed import current_names
from distill.console import print_notice
from distill.files import write
from distill.training import checkpoint, custom_objective
from teachers.errors import UserError

LOCK = ".lock"  # in the run's folder: the holder's process id

_held: dict[Path, TextIO] = {}  # this process's, by folder; open, for closing them lets go


def take(out: Path) -> None:
    """Hold a folder that exists, until `release` or the end of this process.

    Raises:
        UserError: another process holds it.
    """
    if holds(out):
        return
    file = (out / LOCK).open("a+", encoding="utf-8")
    try:
        lock(file, fcntl.LOCK_EX, out)
    except OSError as error:  # a file system without locks
        print_notice(f"{out} cannot be locked ({error.strerror}); start no second run in it")
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _held[out.resolve()] = file


def release(out: Path) -> None:
    """Let go of a folder, if this process holds it."""
    if (file := _held.pop(out.resolve(), None)) is not None:
        file.close()


def refuse_live(out: Path) -> None:
    """Refuse a folder that another process holds, without taking it.

    Raises:
        UserError: another process holds it.
    """
    if holds(out) or not (out / LOCK).exists():
        return
    # suppressed: a file system without locks
    with (out / LOCK).open(encoding="utf-8") as file, suppress(OSError):
        lock(file, fcntl.LOCK_SH, out)


def lock(file: TextIO, kind: int, out: Path) -> None:
    """Lock the file without waiting; closing it unlocks.

    Raises:
        UserError: another process holds it.
        OSError: its file system knows no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another"
        file.close()
        raise UserError(
            f"--out {out}: process {holder} is at work in it; wait for it, or give another folder"
        ) from None


def holds(out: Path) -> bool:
    """Whether this process holds the folder as it is: not one of that name that was deleted."""
    file, path = _held.get(out.resolve()), out / LOCK
    if file is None or not path.exists():
        return False
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


FILES = ("recipe.yaml", "metrics.jsonl", "summary.json", "report.html", ".lock")
FOLDERS = ("checkpoints", "samples", "student")


def hold(out: Path) -> None:
    """Make a run's folder, where there is none, and hold it for this process.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        take(out)
    except OSError as error:
        raise UserError(f"--out {out}: it cannot be written to ({error.strerror})") from None


def check_places(out: Path) -> None:
    """Refuse a folder in which something else stands where a run's files go.

    Raises:
        UserError: naming it.
    """
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out}: it is a link to nothing; give a folder")
    for name in FILES:
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} in it is a folder; give another, or remove that")
    for name in FOLDERS:
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(f"--out {out}: {name} in it is no folder; give another, or remove that")


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse to write over a run, or to go on with a different one, or with one that is at work."""
    check_places(out)
    there = next(p for p in (out.absolute(), *out.absolute().parents) if exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    refuse_live(out)
    written = out / "recipe.yaml"
    if not written.exists():
        if resume and not out.exists():
            raise UserError(f"--resume: there is no run in {out}")
        if out.exists() and any(p for p in out.iterdir() if not p.name.startswith(".")):
            raise UserError(f"--out {out}: it exists and is not a run; give a new folder")
        return
    if not resume:
        raise UserError(f"--out {out}: it holds a run; add --resume, or give another folder")
    before = current_names(read_yaml(written), quiet=True)
    if changed := differences(before, recipe.tree()):
        key, old, new = changed[0]
        raise UserError(
            f"--resume: {key} was {old!r} in {out} and is {new!r} now; "
            "resume with the recipe it began with, or start in another folder"
        )
    taken = checkpoint.steps(out / "checkpoints")
    if taken and (count := int(taken[-1].name[5:])) > recipe.train.steps:
        raise UserError(
            f"--resume: train.steps: {recipe.train.steps} is fewer than the {count} steps that "
            f"the run in {out} has taken; ask for as many or more"
        )
    if taken:
        custom_objective.check_same(recipe, out)


def check_checkpoints(out: Path) -> None:
    """Refuse to resume a run that came to its end and whose checkpoints are gone.

    Raises:
        UserError: training it again would delete what it left.
    """
    if (out / "summary.json").exists() and not checkpoint.steps(out / "checkpoints"):
        raise UserError(
            f"--resume: the run in {out} came to its end and its checkpoints are gone; "
            "train again in another folder"
        )


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml, with every default spelled out, and the user's own objective beside it."""
    write(out / "recipe.yaml", yaml.safe_dump(recipe.tree(), sort_keys=False))
    custom_objective.keep(recipe, out)


def exists(path: Path) -> bool:
    """Whether something is there; a path that cannot even be asked about is a mistake."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"--out {str(path)[:60]}…: {error.strerror}") from None
