"""A folder of pairs: shards in safetensors, what they were made of, and an index once all are made.

A shard is written under another name, flushed and renamed, and depends only on the settings and its
numbers. Making that was killed therefore goes on at the first missing shard and ends with the same
bytes, and several processes make a part of the shards each.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.console import consume_with_bar, print_line
from distill.files import write
from distill.pairs.making import PATH, Maker, encoded, joined
from distill.pairs.settings import PairSettings, identity, teacher_identity
from teachers.errors import UserError
from teachers.storage.files import is_complete, read_json, save_whole
from teachers.teacher import Teacher

FORMAT = 1
SHARD = 1024  # pairs in a file, at most: what a killed process loses
SHARD_BYTES = 1 << 28  # about the size of one file, at most
NEEDED = {"shards", "conditions", "evaluations", "shape", "pairs"}  # keys of an index
NAMES: tuple[str, ...] = ("noise", "x")  # beside a condition's tensors, "cond."…
ABOUT, INDEX = "pairs.json", "index.json"


class Shard(NamedTuple):
    """A file and the numbers of its pairs."""

    file: str
    numbers: range


def shards(total: int, size: int) -> list[Shard]:
    """The files of `total` pairs, `size` in each."""
    starts = range(0, total, size)
    return [
        Shard(f"pairs-{i:05d}.safetensors", range(low, min(low + size, total)))
        for i, low in enumerate(starts)
    ]


def fill(
    folder: Path,
    settings: PairSettings,
    teacher: Teacher,
    key: str = "--out",
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the pairs that a folder lacks; its index.

    Args:
        teacher: Unguided, with its networks where they compute.
        key: The option or key that names the folder.
        known: The teacher's identity; by default that of the teacher as it is now.

    Raises:
        UserError: the folder holds other pairs or other files, or cannot be written.
    """
    settings.check(teacher)
    maker = Maker(settings, teacher)
    known = teacher_identity(settings.teacher, teacher) if known is None else known
    about = {"format": FORMAT, **identity(settings, known, maker.prompts)}
    check_folder(folder, about, key)
    if (index := read_index(folder)) is not None:
        print_line(f"{settings.total:,} pairs are in {folder}")
        return index
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / ABOUT, json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{key} {folder}: it cannot be written to ({error.strerror})") from None
    files = shards(settings.total, rows(maker))
    kind = f"{settings.steps} steps of {settings.solver}"
    consume_with_bar(
        make(folder, maker, files), settings.total, f"making pairs by {kind} in {folder}"
    )
    return finish(folder, about, files)


def rows(maker: Maker) -> int:
    """Pairs in a file: at most `SHARD`, and less where they are large."""
    cond = encoded(maker.teacher, maker.prompts[:1]) or {}
    size = (2 + maker.settings.states) * 4 * math.prod(maker.teacher.shape)
    size += sum(v.numel() * v.element_size() for v in cond.values())
    return max(1, min(SHARD, SHARD_BYTES // size))


def shapes_of(shape: Sequence[int], states: int) -> dict[str, Sequence[int]]:
    """The shapes of one pair's tensors by name, without those of its condition."""
    path = {PATH: [states, *shape]} if states else {}
    return dict.fromkeys(NAMES, shape) | path


def make(folder: Path, maker: Maker, files: list[Shard]) -> Iterator[int]:
    """Make this process's part of the shards, and wait for the others'; yields the pairs made."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    done, shapes = 0, shapes_of(maker.teacher.shape, maker.settings.states)
    for shard in files[rank::world]:
        if not is_shard(folder / shard.file, len(shard.numbers), shapes):
            parts: list[tuple[dict[str, Tensor], int]] = []
            for part in maker.parts(shard.numbers):
                parts.append(part)
                yield done + sum(len(tensors["x"]) for tensors, _ in parts)
            save(folder / shard.file, *joined(parts))
        done += len(shard.numbers)
        yield done
    while world > 1 and not all((folder / s.file).is_file() for s in files):
        time.sleep(0.2)  # if one process fails, all end


def finish(folder: Path, about: dict[str, Any], files: list[Shard]) -> dict[str, Any]:
    """Write the index, which says that no shard is missing."""
    for draft in folder.glob(".pairs-*"):  # of processes that were killed
        draft.unlink(missing_ok=True)
    entries, conditions = [], {}
    for shard in files:
        with opened(folder / shard.file) as file:
            evaluations = int(file.metadata()["evaluations"])
            names = [k for k in file.keys() if k.startswith("cond.")]  # noqa: SIM118
            conditions = {k[5:]: file.get_slice(k).get_shape()[1:] for k in names}
        entries.append(
            {"file": shard.file, "pairs": len(shard.numbers), "evaluations": evaluations}
        )
    index = {
        **about,
        "conditions": conditions,
        "pairs": sum(e["pairs"] for e in entries),
        "evaluations": sum(e["evaluations"] for e in entries),
        "shards": entries,
    }
    write(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return index


def check_folder(folder: Path, about: dict[str, Any], key: str) -> None:
    """Refuse a folder with other pairs, or with files but no pairs.

    Raises:
        UserError: naming the first difference.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key} {folder}: it is a file; give a folder")
    if not (folder / ABOUT).exists():
        if folder.exists() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise UserError(f"{key} {folder}: it has files and no pairs; give a new folder")
        return
    before = read_json(folder / ABOUT, f"pairs {str(folder)!r}")
    for name, value in about.items():
        if before.get(name) != value:
            raise UserError(
                f"{key} {folder}: its pairs have {name} {before.get(name)!r}, not {value!r}; "
                "give another folder, or the same settings"
            )


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of finished pairs whose files are all there and whole; None of others.

    Raises:
        UserError: the index is damaged.
    """
    if not (folder / INDEX).is_file():
        return None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = {folder / str(entry["file"]): int(entry["pairs"]) for entry in index["shards"]}
        data = shapes_of(index["shape"], index.get("states", 0))
        shapes = data | {f"cond.{k}": v for k, v in index["conditions"].items()}
        sound = index.keys() >= NEEDED and bool(files) and isinstance(index["evaluations"], int)
        sound = sound and all(isinstance(v, list) for v in shapes.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound, files, shapes = False, {}, {}
    if not sound:
        raise UserError(
            f"pairs {folder / INDEX}: it is damaged; delete it, and the command that made the "
            "pairs writes it anew"
        )
    return index if all(is_shard(file, pairs, shapes) for file, pairs in files.items()) else None


def is_shard(path: Path, pairs: int, shapes: Mapping[str, Any]) -> bool:
    """Whether a file is a whole shard of so many pairs.

    Args:
        shapes: Of one pair's tensors, by name, which it must have and may have others beside.
    """
    if not is_complete(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            known = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
            evaluations = (file.metadata() or {}).get("evaluations", "")
    except (SafetensorError, OSError):
        return False
    wanted = {k: [pairs, *shape] for k, shape in shapes.items()}
    return evaluations.isdecimal() and all(known.get(k) == v for k, v in wanted.items())


def save(path: Path, tensors: dict[str, Tensor], evaluations: int) -> None:
    """Write a shard whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        save_whole(tensors, path, {"evaluations": str(evaluations)})
    except (SafetensorError, OSError) as error:
        if is_complete(path):  # another process made it and removed this one's draft
            return
        raise UserError(
            f"pairs {path}: it cannot be written ({error}); make room, and the same command goes on"
        ) from None


def opened(path: Path) -> Any:
    """An open shard.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"pairs {path}: it is missing or damaged ({error}); delete it, and the command that "
            "made it makes it again"
        ) from None
