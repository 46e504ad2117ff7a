"""Folders of images with a table of their captions: Hugging Face's imagefolder.

Each metadata.jsonl or metadata.csv names, beside other columns, the images below its own folder by
`file_name`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.data.tables import kind_of
from eval.text import csv_rows, decoded, json_rows
from teachers.errors import UserError, clipped

FILES = ("metadata.jsonl", "metadata.csv")
NAME = "file_name"
TEXTS = ("caption", "text", "prompt")  # columns of captions, unless one is named


def tables(files: Iterable[Path], captions: str | None) -> list[Path]:
    """Of a folder's files the tables, where captions are to come from them.

    Args:
        captions: What `data.captions` is: "metadata:COLUMN", or nothing for the default.
    """
    if captions is not None and captions.partition(":")[0] != "metadata":
        return []
    return [p for p in files if p.name.lower() in FILES and p.is_file()]


def told(tables: Iterable[Path], captions: str | None, where: str) -> dict[Path, Any]:
    """What tables say of images, by the images' paths.

    Raises:
        UserError: a table is damaged or lacks the column, an image has two rows, or a folder two
            tables.
    """
    column = (captions or "").partition(":")[2]
    found: dict[Path, Any] = {}
    of_folder: dict[Path, Path] = {}
    for file in tables:
        if (other := of_folder.setdefault(file.parent, file)) != file:
            raise UserError(f"{where}: both {other} and {file} hold captions; keep one of them")
        for row in rows(file):
            name = row.get(NAME)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{where}: {file} has a row without {NAME}, which names its image; name the "
                    "images there, or say where captions are: data.captions: txt"
                )
            image = file.parent / os.path.normpath(name)  # "./a.png" is "a.png"
            if image in found:
                raise UserError(f"{where}: {file} names {image} again; give each image one row")
            found[image] = text_of(row, column, f"{where}: {file}")
    return found


def text_of(row: dict[str, Any], column: str, who: str) -> Any:
    """The caption in a row.

    Raises:
        UserError: it has no such column.
    """
    found = [row[k] for k in ((column,) if column else TEXTS) if k in row]
    if not found:
        wanted = repr(clipped(column)) if column else ", ".join(map(repr, TEXTS))
        names = clipped(", ".join(str(k) for k in row if k != NAME)) or "none"
        raise UserError(
            f"{who} has no column {wanted}; its columns are {names}: name one as "
            "data.captions: metadata:COLUMN"
        )
    return found[0].strip() if isinstance(found[0], str) else found[0]


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, as mappings.

    Raises:
        UserError: it is not UTF-8, or a row cannot be read for certain, such as a line that is no
            JSON object or has more values than there are columns.
    """
    try:
        text = decoded(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: it {error}; correct it") from None
    try:
        yield from csv_rows(text) if kind_of(file) == ".csv" else json_rows(text)
    except ValueError as error:
        raise UserError(f"{file}: {error}; correct it") from None
