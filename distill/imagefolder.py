"""Folders of images with a table of their captions: Hugging Face's imagefolder.

Each metadata.jsonl or metadata.csv names, beside other columns, the images below its own folder by
`file_name`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.listing import Bad, Item, Listing
from teachers.errors import UserError, clipped

FILES = ("metadata.jsonl", "metadata.csv")
NAME = "file_name"
TEXTS = ("caption", "text", "prompt")  # columns of captions, unless one is named


def tables(folder: Path, captions: str | None) -> list[Path]:
    """The tables in a folder of images, where captions are to come from them.

    Args:
        captions: What `data.captions` is: "metadata:COLUMN", or nothing for the default.
    """
    if captions is not None and captions.partition(":")[0] != "metadata":
        return []
    return sorted(p for name in FILES for p in folder.rglob(name) if p.is_file())


def listed(
    files: list[Path], images: list[Path], captions: str | None, where: str, needs: Any
) -> Listing:
    """The images, each with what the tables say of it.

    Args:
        files: The tables.
        images: All images in the folder, in order.
        needs: What every item must come with, as `Listing.add` has it.

    Raises:
        UserError: a table is damaged, or lacks the column.
    """
    column = (captions or "").partition(":")[2]
    told: dict[Path, Any] = {}
    listing = Listing(where)
    for file in files:
        for row in rows(file):
            name = row.get(NAME)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{where}: {file} has a row without {NAME}, which names its image; name the "
                    "images there, or say where captions are: data.captions: txt"
                )
            path = file.parent / name
            told[path] = text_of(row, column, f"{where}: {file}")
            if not path.is_file():
                listing.bad.append(Bad(str(path), "missing image", f"{file.name} names it"))
    for path in images:
        listing.add(Item(str(path), told.get(path), path.read_bytes), needs)
        listing.contents.append(path)
    return listing


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
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: it is not UTF-8 ({error}); save it as that") from None
    if file.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object; expected one for each image")
        yield row
