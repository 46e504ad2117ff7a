"""Where a user's paths lead, and files of weights, written so that whoever may read a new file of
the user's may read them."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from teachers.errors import UserError, clipped


def home(path: str | Path, who: str = "") -> Path:
    """A path with `~` and `~name` at its start replaced by the home folder of that user.

    Args:
        who: Begins the message: the key or option that the path is given by.

    Raises:
        UserError: there is no such user here, or the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        said = clipped(path)
        user = clipped(Path(path).parts[0])
        raise UserError(
            f"{f'{who}: ' if who and who != said else ''}{said}: the home folder of {user} is not "
            f"known; write the folder out, or ./{user} for one of that name"
        ) from None


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions that any new file gets here.

    Raises:
        SafetensorError: it cannot be written.
    """
    from safetensors.torch import save_file

    save_file(tensors, path, None if metadata is None else dict(metadata))
    path.chmod(new_mode(path.parent))


def open_to_readers(folder: Path) -> None:
    """Give every file under a folder the permissions of a new one.

    safetensors, and with it `save_pretrained`, leaves files that their owner alone may read.
    """
    mode = new_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def new_mode(folder: Path) -> int:
    """The permission bits of a file that is created in a folder: 0o644 under the usual umask.

    One is created to see: the umask cannot be read without changing it for all threads.
    """
    probe = folder / f".mode-{os.getpid()}-{threading.get_ident()}"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def read_json(path: Path, who: str) -> dict[str, Any]:
    """A JSON object from a file that must be there and be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{who}: {path} is missing; give a diffusers pipeline folder") from None
    except OSError as error:  # such as a folder of that name
        raise UserError(
            f"{who}: {path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else clipped(error)
        raise UserError(f"{who}: {path} is not valid JSON ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{who}: {path}: expected a JSON object")
    return content
