"""Files that are written whole or not at all, and whether files are still the same."""

from __future__ import annotations

import os
from pathlib import Path

from teachers.errors import UserError
from teachers.storage.files import home, new_mode
from teachers.teacher import EMBEDDED

DECIDING = (".safetensors", ".pkl", ".py", "config.json", "model_index.json")  # ends of names


def write(path: Path, text: str) -> None:
    """Write a file so that a cut leaves the old one or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def stamps(source: str) -> dict[str, list[int]]:
    """Size and time of every file of weights, code or settings that a local source is made of.

    Figures that were kept of it count only while these are the same. What is fetched by name has
    none, and its name says which it is.
    """
    path = EMBEDDED.get(source) or home(source.partition(":")[0])
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    kept = [p for p in files if p.name.endswith(DECIDING) and "checkpoints" not in p.parts]
    return {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in kept}


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before any work is done for it.

    Raises:
        UserError: naming the option that it was given by.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist; make it")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: it cannot be written; give another file")
        return
    try:  # some file systems, such as /proc, let all write and none create
        new_mode(path.parent)
    except OSError as error:
        raise UserError(
            f"{option} {path}: it cannot be written ({error.strerror}); give another folder"
        ) from None
