"""Folders of images with a table of their captions: Hugging Face's imagefolder.

Each metadata.jsonl or metadata.csv names, beside other columns, the images below its own folder by
`file_name`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eval.text import decoded, lines
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
    return [p for p in files if p.name in FILES and p.is_file()]


def told(tables: Iterable[Path], captions: str | None, where: str) -> dict[Path, Any]:
    """What tables say of images, by the images' paths.

    Raises:
        UserError: a table is damaged, or lacks the column.
    """
    column = (captions or "").partition(":")[2]
    found: dict[Path, Any] = {}
    for file in tables:
        for row in rows(file):
            name = row.get(NAME)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{where}: {file} has a row without {NAME}, which names its image; name the "
                    "images there, or say where captions are: data.captions: txt"
                )
            found[file.parent / name] = text_of(row, column, f"{where}: {file}")
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
        UserError: it is not UTF-8, or a line is no JSON object.
    """
    try:
        text = decoded(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} {error}") from None
    if file.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object; expected one for each image")
        yield row
