"""Writing a file whole, and whether files have changed."""

from __future__ import annotations

import os
from pathlib import Path

from teachers.errors import UserError
from teachers.storage.files import home, new_mode
from teachers.teacher import EMBEDDED

# Ends of the names of files on which a teacher's outputs depend.
DECIDING = (".safetensors", ".pkl", ".pt", ".pth", ".py", "config.json", "model_index.json")


def write(path: Path, text: str) -> None:
    """Write a text file so that a kill, or a second writer, leaves the old text or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def stamps(source: str) -> dict[str, list[int]]:
    """Size and time of change of each weight, code and config file of a local source, by path.

    Saved results of a source hold while its stamps are the same. A source on the Hub has none.
    """
    path = EMBEDDED.get(source) or home(source.partition(":")[0])
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    deciding = [p for p in files if p.name.endswith(DECIDING) and "checkpoints" not in p.parts]
    return {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in deciding}


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Args:
        option: The command's option that names the file.

    Raises:
        UserError: naming the option.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist; make it")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: it cannot be written; give another file")
        return
    try:  # in some file systems, such as /proc, permission to write does not allow new files
        new_mode(path.parent)
    except OSError as error:
        raise UserError(
            f"{option} {path}: it cannot be written ({error.strerror}); give another folder"
        ) from None
