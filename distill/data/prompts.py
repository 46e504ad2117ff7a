"""Prompts without images: from a text file, a table's column, or a pack."""

from __future__ import annotations

from pathlib import Path

from distill.config.schema import Column
from distill.data.listing import BadItem, Item, Listing, Needs
from distill.data.tables import (
    SUFFIXES,
    check_place,
    existing_table,
    kind_of,
    open_table,
    parse_column,
)
from eval.text import MARK, decoded, lines
from teachers.errors import UserError, nearest
from teachers.storage.files import home

PACKS = Path(__file__).parent / "packs"


def list_prompts(place: str | Column, needs: Needs = "caption") -> Listing:
    """The prompts that `data.prompts` names.

    Args:
        place: A text file with a prompt on each line, "pack:NAME", "DATASET:COLUMN" where DATASET
            is a table file, a saved dataset or a Hub id, or the same as a mapping.
        needs: "caption", or "label" for a class-conditional teacher.

    Raises:
        UserError: the file, pack, dataset or column does not exist, or holds no prompts.
    """
    location = place_of_prompts(place)
    if isinstance(location, Column):
        return _column(location, needs)
    return _lines(location, str(place), needs)


def place_of_prompts(place: str | Column) -> Path | Column:
    """The text file or the column that `data.prompts` names; nothing is read.

    Raises:
        UserError: it does not exist, as far as can be known without asking the Hub.
    """
    with check_place("data.prompts", place):
        return _place(place)


def _place(place: str | Column) -> Path | Column:
    if isinstance(place, str):
        if place.startswith("pack:"):
            return pack(place.removeprefix("pack:"))
        file = home(place, "data.prompts")
        if file.is_dir():
            raise UserError(
                f"data.prompts: {place!r} is a folder; give a text file in it, one prompt a line"
            )
        if file.is_file() and kind_of(file) in SUFFIXES:
            raise UserError(
                f"data.prompts: {place!r} is a table; name its column: '{place}:COLUMN'"
            )
        if file.is_file():
            return file
        if file.exists():
            raise UserError(
                f"data.prompts: {place!r} is a pipe or a device, which cannot be read again; save "
                "the prompts in a text file"
            )
        refusal = (
            f"data.prompts: no such file: {place!r}; give a text file, 'pack:starter', or "
            "'DATASET:COLUMN'"
        )
        place = parse_column(place, refusal)
    return existing_table(place, "data.prompts")


def pack(name: str) -> Path:
    """The file of a pack that comes with the package."""
    packs = [p.stem for p in PACKS.glob("*.txt")]
    if name not in packs:
        raise UserError(f"data.prompts: no pack {name!r}; {nearest(name, packs)}")
    return PACKS / f"{name}.txt"


def _lines(file: Path, place: str, needs: Needs) -> Listing:
    """One prompt on each line; blank lines at the end are skipped, others are empty captions."""
    listing = Listing(f"data.prompts: {place!r}")
    try:
        text = decoded(file.read_bytes())
    except OSError as error:
        raise UserError(f"{listing.where} cannot be read ({error.strerror}); check it") from None
    except ValueError as error:
        raise UserError(f"{listing.where} {error}") from None
    for number, line in enumerate(lines(text.rstrip()), 1):
        name, prompt = f"{place}:{number}", line.strip().lstrip(MARK).lstrip()
        if "\r" in prompt:
            reason = "it holds a carriage return within a line; end lines with \\n or \\r\\n"
            listing.bad.append(BadItem(name, "control character", reason))
        else:
            listing.add(Item(name, prompt), needs)
    return _not_empty(listing)


def _column(place: Column, needs: Needs) -> Listing:
    listing = Listing(f"data.prompts: '{place.hf}:{place.column}'")
    table = open_table(place.hf, place.split, listing.where)
    table.check_column(place.column, listing.where)
    listing.numbered = table.numbered(place.column)
    for row, value in enumerate(table.values(place.column)):
        text = value.strip() if isinstance(value, str) else value
        listing.add(Item(f"{table.name}[{row}]", text), needs)
    return _not_empty(listing)


def _not_empty(listing: Listing) -> Listing:
    if not listing.total:
        raise UserError(f"{listing.where} holds no prompts; give at least one")
    return listing
