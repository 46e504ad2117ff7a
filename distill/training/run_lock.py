"""One process at a time trains in a run's folder.

The lock is the kernel's (`flock` on a hidden file), so that it ends with the process however that
ends, a SIGKILL included. It belongs to the process: who holds a folder may take it again.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from distill.console import notice
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
        notice(f"{out} cannot be locked ({error.strerror}); start no second run in it")
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
