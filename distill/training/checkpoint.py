"""Checkpoints: whole or absent, hashed, and never unpickled.

A checkpoint is a folder with one safetensors file (all tensors), one JSON file (the structure
around them) and a manifest with the SHA-256 of both. It is written under a draft name, flushed to
the disk and renamed, so that a process killed at any moment leaves the last whole checkpoint as the
newest. An older one of the same name is moved aside first, and is read from there until the new one
is in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from teachers.errors import UserError
from teachers.storage.files import save_tensors

MANIFEST, TENSORS, TREE = "manifest.json", "state.safetensors", "state.json"
TENSOR = "__tensor__"


def save(state: Any, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to `folder`, atomically.

    Args:
        about: Kept in the manifest, readable without the tensors.

    Raises:
        UserError: it cannot be written; earlier checkpoints are unchanged.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        _settle(folder)
        shutil.rmtree(draft, ignore_errors=True)
        _write(state, draft, about or {})
        old = _aside(folder)
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)  # it may fill the disk
        raise UserError(
            f"checkpoint {folder}: it cannot be written ({error}); "
            "make room, and resume from the one before it with --resume"
        ) from None


def _write(state: Any, draft: Path, about: dict[str, Any]) -> None:
    """Write the files of a checkpoint to a new folder, and flush them to the disk."""
    draft.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors)
    save_tensors(tensors, draft / TENSORS)
    (draft / TREE).write_text(json.dumps(tree), encoding="utf-8")
    hashes = {name: _digest(draft / name) for name in (TENSORS, TREE)}
    manifest = json.dumps({"sha256": hashes, **about}, indent=2)
    (draft / MANIFEST).write_text(manifest, encoding="utf-8")
    for name in (TENSORS, TREE, MANIFEST, "."):
        _flush(draft / name)


def load(folder: Path) -> Any:
    """The state saved in `folder`; its tensors are on the CPU.

    Raises:
        UserError: a file is missing, or its hash is not the manifest's.
    """
    remedy = f"delete {folder} to resume from the one before it"
    hashes = about(folder)["sha256"]
    folder = _where(folder)
    for name in (TENSORS, TREE):
        if not (folder / name).exists():
            raise UserError(f"checkpoint {folder}: {name} is missing; {remedy}")
        if _digest(folder / name) != hashes.get(name):
            raise UserError(f"checkpoint {folder}: {name} is truncated or damaged; {remedy}")
    return _unpack(
        json.loads((folder / TREE).read_text(encoding="utf-8")), load_file(folder / TENSORS)
    )


def about(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`."""
    try:
        manifest = json.loads((_where(folder) / MANIFEST).read_text(encoding="utf-8"))
        manifest["sha256"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"checkpoint {folder}: {MANIFEST} is missing or damaged; "
            f"delete {folder} to resume from the one before it"
        ) from None
    return manifest


def steps(root: Path) -> list[Path]:
    """The step checkpoints under `root`, oldest first."""
    folders = {p for p in root.glob("step-*") if p.is_dir()}
    folders |= {_of(old) for old in root.glob(".step-*.old")}
    return sorted((p for p in folders if p.name[5:].isdecimal()), key=lambda p: int(p.name[5:]))


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` step checkpoints, and clean up after killed writers."""
    for old in root.glob(".*.old"):
        _settle(_of(old))
    for folder in [*steps(root)[:-keep], *root.glob(".*.draft")]:
        shutil.rmtree(folder, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where a checkpoint waits while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _of(old: Path) -> Path:
    """The checkpoint that was moved to `old`."""
    return old.with_name(old.name[1 : -len(".old")])


def _where(folder: Path) -> Path:
    """Where to read a checkpoint from. Nothing is moved, since its writer may be at work."""
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def _settle(folder: Path) -> None:
    """Finish a replacement that a kill cut short: delete the old one, or move it back."""
    if folder.exists():
        shutil.rmtree(_aside(folder), ignore_errors=True)
    elif _aside(folder).exists():
        os.replace(_aside(folder), folder)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {k: _pack(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, tensors) for v in value]
    return value


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {TENSOR}:
            return tensors[tree[TENSOR]]
        return {k: _unpack(v, tensors) for k, v in tree.items()}
    return [_unpack(v, tensors) for v in tree] if isinstance(tree, list) else tree


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
