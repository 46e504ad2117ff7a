"""Captions of images: in a file beside each image, in a sample of a shard, or in a folder's table.

A folder's table has the format of Hugging Face's imagefolder: each metadata.jsonl or metadata.csv
has a column `file_name`, which names images below the table's own folder, and a column of captions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.data.tables import kind_of
from eval.text import csv_rows, decoded, json_rows, json_value
from teachers.errors import UserError, clipped

KEYS = ("caption", "text", "prompt")  # keys or columns that may hold captions, unless one is named
TABLES = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"

Sidecars = dict[Path, list[Path]]  # .txt and .json files, by their path with a lower-case suffix


def sidecar_kinds(captions: str | None, where: str) -> list[str]:
    """Which kinds of files hold captions: "txt", "json", or one of them.

    Args:
        captions: The value of `data.captions`.
        where: Begins messages about the images, such as "data.source: 'photos'".

    Raises:
        UserError: `data.captions` names something else.
    """
    kind, source = (captions or "").partition(":")[0], where.removeprefix("data.source: ")
    if kind == "metadata":
        raise UserError(
            f"data.captions: {captions!r}: {source} holds no metadata.jsonl or metadata.csv; add "
            "one, or name another place for captions"
        )
    if kind not in ("", "txt", "json", "folder"):
        raise UserError(
            f"data.captions: {captions!r}: for {source} expected 'txt', 'json:KEY', 'folder' or "
            "'metadata:COLUMN'"
        )
    return [kind] if kind else ["txt", "json"]


# ---- files beside images, and members of a sample


def sidecars_in(files: Iterable[Path]) -> Sidecars:
    """The files that may hold captions, from all files of a folder."""
    sidecars: Sidecars = {}
    for file in files:
        if (suffix := kind_of(file)) in (".txt", ".json") and file.is_file():
            sidecars.setdefault(file.with_suffix(suffix), []).append(file)
    return sidecars


def caption_beside(
    image: Path, sidecars: Sidecars, kinds: Iterable[str], captions: str | None
) -> Any:
    """The caption in a file beside an image; None if there is no such file.

    Raises:
        ValueError: it cannot be read; the message names the file and the reason.
    """
    contents = {}
    for kind in kinds:
        files = sidecars.get(image.with_suffix(f".{kind}"), [])
        if len(files) > 1:
            raise ValueError(f"both {files[0].name} and {files[1].name} lie beside it; keep one")
        if files:
            contents[kind] = (files[0].name, files[0].read_bytes())
    return caption_in(contents, captions)


def caption_in(contents: dict[str, tuple[str, bytes]], captions: str | None) -> Any:
    """The caption in files of one image; None if there are none.

    Args:
        contents: By kind, "txt" or "json": the file's name and its bytes.
        captions: The value of `data.captions`; "json:KEY" names the key.

    Raises:
        ValueError: the file is not UTF-8, is not valid JSON, or lacks or repeats a key; the
            message names the file.
    """
    if "txt" in contents:
        return text_of(*contents["txt"]).strip()
    if "json" not in contents:
        return None
    name, content = contents["json"]
    text = text_of(name, content)
    try:
        tree = json_value(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    key = (captions or "").partition(":")[2]
    keys = (key,) if key else KEYS
    values = [tree[k] for k in keys if k in tree] if isinstance(tree, dict) else []
    if not values:
        raise ValueError(f"{name} holds no {' or '.join(map(repr, keys))}")
    return _stripped(values[0])


def text_of(name: str, content: bytes) -> str:
    """The text of a file.

    Raises:
        ValueError: its encoding cannot be read; the message names the file.
    """
    try:
        return decoded(content)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


# ---- tables of a folder


def tables_in(files: Iterable[Path], captions: str | None) -> list[Path]:
    """The tables of captions, from all files of a folder; none if captions are elsewhere.

    Args:
        captions: The value of `data.captions`: "metadata:COLUMN", or None for the default.
    """
    if captions is not None and captions.partition(":")[0] != "metadata":
        return []
    return [p for p in files if p.name.lower() in TABLES and p.is_file()]


def captions_in_tables(tables: Iterable[Path], captions: str | None, where: str) -> dict[Path, Any]:
    """The captions in tables, by the path of the image.

    Raises:
        UserError: a table is damaged or lacks the column, an image has two rows, or a folder has
            two tables.
    """
    column = (captions or "").partition(":")[2]
    by_image: dict[Path, Any] = {}
    by_folder: dict[Path, Path] = {}
    for file in tables:
        if (other := by_folder.setdefault(file.parent, file)) != file:
            raise UserError(f"{where}: both {other} and {file} hold captions; keep one of them")
        for row in _rows(file):
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{where}: {file} has a row without {FILE_NAME}, which names its image; fill "
                    "it in, or set data.captions to txt"
                )
            image = file.parent / os.path.normpath(name)  # "./a.png" is "a.png"
            if image in by_image:
                raise UserError(f"{where}: {file} names {image} again; give each image one row")
            by_image[image] = _caption_in_row(row, column, f"{where}: {file}")
    return by_image


def _caption_in_row(row: dict[str, Any], column: str, table: str) -> Any:
    """The caption in a row of a table.

    Args:
        column: The column's name; "" for the first of KEYS in the row.
        table: Begins the message.

    Raises:
        UserError: the row has no such column.
    """
    values = [row[k] for k in ((column,) if column else KEYS) if k in row]
    if not values:
        expected = repr(clipped(column)) if column else ", ".join(map(repr, KEYS))
        names = clipped(", ".join(str(k) for k in row if k != FILE_NAME)) or "none"
        raise UserError(
            f"{table}: no column {expected}; its columns are {names}; name one with "
            "data.captions: metadata:COLUMN"
        )
    return _stripped(values[0])


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, as mappings.

    Raises:
        UserError: the file is not UTF-8, or a row is ambiguous: a line that is no JSON object, or
            has more values than there are columns.
    """
    try:
        text = decoded(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: it {error}") from None
    try:
        yield from csv_rows(text) if kind_of(file) == ".csv" else json_rows(text)
    except ValueError as error:
        raise UserError(f"{file}: {error}; correct the file") from None
