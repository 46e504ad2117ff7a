"""Files of weights, written so that whoever may read a new file of the user's may read them."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


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
