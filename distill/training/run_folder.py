"""A run's folder: whether a run may start or resume in it, and its lock for one process at a time.

The lock is the kernel's (`flock` on a hidden file): it ends with the process, also on SIGKILL. It
belongs to the process, which may take the same folder again. docs/decisions/0008 says why it is not
the filelock package's.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from distill.config.compare import differences
from distill.config.paths import note_start
from distill.config.recipe import Recipe, read_yaml
from distill.config.renamed import current_names
from distill.console import print_notice
from distill.files import write
from distill.training import checkpoint, custom_objective
from teachers.errors import UserError

LOCK = ".lock"  # in the run's folder; it contains the holder's process id
FILES = ("recipe.yaml", "metrics.jsonl", "summary.json", "report.html", LOCK)
ADAPTERS = "adapters.json"  # names, hashes and strengths of the LoRA files in the teacher
FOLDERS = ("checkpoints", "samples", "student")

_locks: dict[Path, TextIO] = {}  # this process's lock files, by folder; closing one releases it


def take(out: Path) -> None:
    """Lock an existing folder until `release` or the end of this process.

    Raises:
        UserError: another process holds it.
    """
    if not holds(out):
        _locks[out.resolve()] = locked(out)


def holding() -> bool:
    """Whether this process holds a folder: its run has begun."""
    return bool(_locks)


def release(out: Path) -> None:
    """Unlock a folder, if this process holds it."""
    if (file := _locks.pop(out.resolve(), None)) is not None:
        file.close()


def refuse_live(out: Path) -> None:
    """Refuse a folder that another process holds, without locking it.

    Raises:
        UserError: another process holds it.
    """
    if holds(out) or not (out / LOCK).exists():
        return
    # suppressed: a file system without locks
    with (out / LOCK).open(encoding="utf-8") as file, suppress(OSError):
        lock(file, fcntl.LOCK_SH, out)


def locked(out: Path, heirs: str = "") -> TextIO:
    """A folder's lock file, locked until it is closed, here and in processes that inherited it.

    Args:
        heirs: Named in the message beside the holder: who else may hold what it locked.

    Raises:
        UserError: another process holds the folder.
    """
    file = (out / LOCK).open("a+", encoding="utf-8")
    try:
        lock(file, fcntl.LOCK_EX, out, heirs)
    except OSError as error:  # a file system without locks
        print_notice(f"{out} cannot be locked ({error.strerror}); start no second process in it")
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def lock(file: TextIO, kind: int, out: Path, heirs: str = "") -> None:
    """Lock the file without waiting; closing it unlocks.

    Args:
        kind: fcntl.LOCK_EX or LOCK_SH.
        heirs: As for `locked`.

    Raises:
        UserError: another process holds it.
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another"
        file.close()
        raise UserError(
            f"--out {out}: process {holder}{heirs} is at work in it; wait for it, or give another "
            "folder"
        ) from None


def holds(out: Path) -> bool:
    """Whether this process holds the folder that is there now, not a deleted one of its name."""
    file, path = _locks.get(out.resolve()), out / LOCK
    if file is None or not path.exists():
        return False
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def hold(out: Path) -> None:
    """Make a run's folder unless it exists, and lock it for this process.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        take(out)
    except OSError as error:
        raise UserError(f"--out {out}: it cannot be written to ({error.strerror})") from None


def check_places(out: Path) -> None:
    """Refuse a folder in which a folder has the name of a run's file, or the other way round.

    Raises:
        UserError: naming it.
    """
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out}: it is a link to a path that does not exist; give a folder")
    for name in FILES:
        if (out / name).is_dir():
            raise UserError(
                f"--out {out}: {name} in it is a folder; remove it, or give another --out"
            )
    for name in FOLDERS:
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(
                f"--out {out}: {name} in it is a file; remove it, or give another --out"
            )


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse to write over a run, to resume a different one, or one that another process holds.

    Raises:
        UserError: naming the option or the key.
    """
    check_places(out)
    check_can_write(out)
    refuse_live(out)
    if not (out / "recipe.yaml").exists():
        check_new(out, resume)
    elif resume:
        check_same_run(recipe, out)
    else:
        raise UserError(f"--out {out}: it holds a run; add --resume, or give another folder")


def check_can_write(out: Path) -> None:
    """Refuse a folder that cannot be written to, or cannot be made.

    Raises:
        UserError: naming what is in the way.
    """
    nearest = next(p for p in (out.absolute(), *out.absolute().parents) if exists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"--out {out}: {nearest} is not a folder that can be written to; give another"
        )


def check_new(out: Path, resume: bool) -> None:
    """Refuse a folder without a run that contains other files, or from which to resume.

    Raises:
        UserError: naming the option.
    """
    if resume and not out.exists():
        raise UserError(f"--resume: there is no run in {out}; remove --resume to start one")
    if out.exists() and any(p for p in out.iterdir() if not p.name.startswith(".")):
        raise UserError(f"--out {out}: it exists and is not a run; give a new folder")


def check_same_run(recipe: Recipe, out: Path) -> None:
    """Refuse to resume a run by another recipe than it was started with.

    Raises:
        UserError: naming the first key that differs.
    """
    before = current_names(read_yaml(out / "recipe.yaml"), quiet=True)
    if changed := differences(before, recipe.tree()):
        key, old, new = changed[0]
        raise UserError(
            f"--resume: {key} was {old!r} in {out} and is {new!r} now; "
            "resume with the recipe it began with, or start in another folder"
        )
    saved = checkpoint.steps(out / "checkpoints")
    if not saved:
        return
    if (count := int(saved[-1].name[5:])) > recipe.train.steps:
        raise UserError(
            f"--resume: train.steps: {recipe.train.steps} is fewer than the {count} steps that "
            f"the run in {out} has taken; set it to {count} or more"
        )
    custom_objective.check_same(recipe, out)


def check_checkpoints(out: Path) -> None:
    """Refuse to resume a finished run without checkpoints: training again would delete its student.

    Raises:
        UserError: it is one.
    """
    if (out / "summary.json").exists() and not checkpoint.steps(out / "checkpoints"):
        raise UserError(
            f"--resume: the run in {out} has ended and its checkpoints are gone; "
            "train again in another folder"
        )


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Write recipe.yaml, with every default, and a copy of the user's own objective beside it.

    And the working folder, which the recipe's paths are relative to.
    """
    note_start(out)
    write(out / "recipe.yaml", yaml.safe_dump(recipe.tree(), sort_keys=False))
    custom_objective.keep(recipe, out)


def keep_adapters(fusion: Any, out: Path) -> None:
    """Write the hashes of the LoRA files in the teacher's weights, or compare them.

    Args:
        fusion: The teacher's; None if it has no such files.

    Raises:
        UserError: a resumed run began with other contents of a file.
    """
    if fusion is None:
        return
    file, now = out / ADAPTERS, fusion.contents()
    if not file.exists():
        write(file, json.dumps(now, indent=2) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for entry in now:
        if entry not in before:
            raise UserError(
                f"--resume: teacher.adapters: {entry['file']} has another content than when the "
                f"run in {out} began; restore it, or start in another folder"
            )


def exists(path: Path) -> bool:
    """Whether a path exists.

    Raises:
        UserError: the system refuses the path, such as one whose name is too long.
    """
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"--out {str(path)[:60]}…: {error.strerror}") from None
