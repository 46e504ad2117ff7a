"""User paths, JSON files, and weight files with the permissions of any new file."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from teachers.errors import UserError, clipped


def home(path: str | Path, who: str = "") -> Path:
    """Expand `~` and `~name` at the start of a path.

    Args:
        who: The key or option that the path was given for; starts the message.

    Raises:
        UserError: there is no such user, or the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        shown = clipped(path)
        user = clipped(Path(path).parts[0])
        raise UserError(
            f"{f'{who}: ' if who and who != shown else ''}{shown}: the home folder of {user} is "
            f"unknown; write the full path, or ./{user} for a folder of that name"
        ) from None


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any new file.

    Raises:
        SafetensorError: the file cannot be written.
    """
    from safetensors.torch import save_file

    save_file(tensors, path, None if metadata is None else dict(metadata))
    path.chmod(new_mode(path.parent))


def open_to_readers(folder: Path) -> None:
    """Give every file under a folder the permissions of a new file.

    safetensors, and so `save_pretrained`, writes files that only their owner may read.
    """
    mode = new_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def new_mode(folder: Path) -> int:
    """The permission bits of a new file in a folder: 0o644 under the usual umask.

    It creates a file to find out, because reading the umask would change it for all threads.
    """
    probe = folder / f".mode-{os.getpid()}-{threading.get_ident()}"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def read_json(path: Path, who: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{who}: {path} is missing; give a diffusers pipeline folder") from None
    except OSError as error:  # for example a folder of that name
        raise UserError(f"{who}: {path}: cannot be read ({error.strerror}); check it") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else clipped(error)
        raise UserError(f"{who}: {path} is not valid JSON ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{who}: {path}: expected a JSON object")
    return content


def save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all, and wait until it is on the disk.

    Raises:
        SafetensorError, OSError: it cannot be written; nothing is left of it.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_tensors({k: v.contiguous() for k, v in tensors.items()}, draft, metadata)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (SafetensorError, OSError):
        draft.unlink(missing_ok=True)
        raise


def is_complete(path: Path) -> bool:
    """Whether a safetensors file exists and has the length that its header states."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
