"""Images with their captions or labels, listed from folders, WebDataset shards and tables.

Nothing is decoded here: `pictures.py` reads the pixels later. The order of a list depends only on
names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distill.config.schema import Column
from distill.console import print_notice
from distill.data.captions import (
    caption_beside,
    captions_in_tables,
    sidecar_kinds,
    sidecars_in,
    tables_in,
)
from distill.data.conditions.partners import partners_in, stem_of
from distill.data.listing import BadItem, Item, Listing, Needs, Partners
from distill.data.shards import list_shards, note_files_beside, shards_at
from distill.data.tables import SUFFIXES as TABLES
from distill.data.tables import (
    Table,
    check_place,
    existing_table,
    kind_of,
    open_table,
    parse_column,
)
from eval.images import files_in, is_hidden, is_image
from teachers.errors import UserError, clipped
from teachers.storage.files import home


def list_images(
    place: str | Column,
    captions: str | None,
    classes: int,
    captioned: bool,
    partners: Partners | None = None,
) -> Listing:
    """The images that `data.source` names.

    Args:
        place: A folder of images, .tar shards (a file, a folder of them, or a pattern with * or
            {0000..0099}), "DATASET:COLUMN", or the same as a mapping.
        captions: Where captions are: "txt" or "json:KEY" for files beside the images, "folder" for
            the name of the image's folder, "metadata:COLUMN", or a column of the table. By default
            .txt, then .json.
        classes: How many labels a class-conditional teacher knows, else 0.
        captioned: Whether the teacher reads text.
        partners: What comes with each image, if the teacher takes a picture with each prompt.

    Raises:
        UserError: there are no images, or no folder of classes where labels are needed.
    """
    location, needs = place_of_images(place), needs_of(classes, captioned)
    if isinstance(location, Column):
        listing = _table(location, captions, needs, partners)
    else:
        where = f"data.source: {place!r}"
        try:
            if isinstance(location, list):
                listing = list_shards(location, where, captions, needs)
                folder = home(str(place), "data.source")
                if folder.is_dir():
                    note_files_beside(listing, folder, location)
            else:
                listing = _folder(location, where, captions, needs)
            if partners is not None:
                _join_partners(listing, location, partners)
        except OSError as error:
            file, reason = error.filename or "a file", error.strerror or error
            raise UserError(
                f"{where}: {file} cannot be read ({reason}); check its permissions"
            ) from None
    if not listing.total:
        raise UserError(f"{listing.where} holds no images{_other_files(listing)}")
    listing.tell_left_out()
    return listing


def needs_of(classes: int, captioned: bool) -> Needs:
    """What each item needs for a teacher of `classes` labels, or for one that reads text."""
    return "label" if classes else "caption" if captioned else ""


def _other_files(listing: Listing) -> str:
    """Ends the message about a place without images: what other files are there."""
    if not listing.left_out:
        return "; give a folder of files such as .png, .jpg and .webp, .tar shards, or a table"
    first = listing.left_out[0]
    return f", but {len(listing.left_out)} other files, such as {first.name}: {first.reason}"


def place_of_images(place: str | Column) -> Column | list[Path] | Path:
    """The table, the shards or the folder that `data.source` names; nothing is read.

    Raises:
        UserError: it does not exist, as far as can be known without asking the Hub.
    """
    with check_place("data.source", place):
        return _place(place)


def _place(place: str | Column) -> Column | list[Path] | Path:
    where = f"data.source: {place!r}"
    if isinstance(place, str):
        folder = home(place, "data.source")
        if (shards := shards_at(place, where)) is not None:
            return shards
        if folder.is_dir():
            return folder
        if kind_of(folder) in TABLES and folder.is_file():
            raise UserError(f"{where} is a table; name its column of images: '{place}:COLUMN'")
        refusal = (
            f"{where} is not a folder; give 'digits', a folder of images, .tar shards, or "
            "'DATASET:COLUMN'"
        )
        place = parse_column(place, refusal)
    return existing_table(place, "data.source")


# ---- folders


def _folder(folder: Path, where: str, captions: str | None, needs: Needs) -> Listing:
    """The images of a folder, with labels from its subfolders, or with captions."""
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    if needs == "label" and captions is None:
        return _labelled_folder(folder, subfolders, where)
    if subfolders and not needs:
        print_notice(f"{where}: the teacher has no classes, so subfolders are not read as labels")
    return _captioned_folder(folder, where, captions, needs)


def _labelled_folder(folder: Path, subfolders: list[Path], where: str) -> Listing:
    """The images in subfolders, each of which is a class."""
    if not subfolders:
        raise UserError(
            f"{where} has 0 subfolders; for a class-conditional teacher, put the images of each "
            "class in a subfolder of its own, or give captions"
        )
    listing = Listing(where, folders=[p.name for p in subfolders])
    if all(p.name.isdecimal() for p in subfolders):
        subfolders = sorted(subfolders, key=lambda p: int(p.name))
    order = {p.name: i for i, p in enumerate(subfolders)}

    def class_name(path: Path) -> str:
        return path.relative_to(folder).parts[0]

    for path in sorted(files_in(folder), key=lambda p: (order.get(class_name(p), -1), p)):
        if is_image(path) and path.parent == folder:
            reason = "it lies beside the class folders, and so has no label; move it into one"
            listing.left_out.append(BadItem(str(path), "no class", reason))
        else:
            _add_file(listing, path, class_name, "label")
    return listing


def _captioned_folder(folder: Path, where: str, captions: str | None, needs: Needs) -> Listing:
    """The images of a folder and of the folders below it, with captions where they are needed."""
    listing, files = Listing(where), files_in(folder)
    tables = tables_in(files, captions) if needs else []
    by_image = captions_in_tables(tables, captions, where)
    for path in sorted(by_image.keys() - set(files)):
        if not path.is_file():
            reason = "a table of captions names it, but there is no such file"
            listing.bad.append(BadItem(str(path), "missing image", reason))
    caption_of: Callable[[Path], Any]
    if not needs:
        caption_of = _no_caption
    elif tables:
        caption_of = by_image.get
    elif captions == "folder":
        caption_of = _folder_name
    else:
        kinds, sidecars = sidecar_kinds(captions, where), sidecars_in(files)
        caption_of = partial(caption_beside, sidecars=sidecars, kinds=kinds, captions=captions)
    for path in files:
        _add_file(listing, path, caption_of, needs)
    return listing


def _no_caption(path: Path) -> None:
    return None


def _folder_name(path: Path) -> str:
    return path.parent.name


def _add_file(listing: Listing, path: Path, prompt_of: Callable[[Path], Any], needs: Needs) -> None:
    """Add a file of a folder to the listing, or note why it is left out.

    Args:
        prompt_of: The caption or label of an image; raises ValueError if it cannot be read.
    """
    if not is_image(path):
        listing.note_unread(path)
        return
    if not path.is_file():
        listing.bad.append(BadItem(str(path), "missing file", _no_file(path)))
        return
    listing.contents.append(path)
    try:
        prompt = prompt_of(path)
    except ValueError as error:
        listing.bad.append(BadItem(str(path), "unreadable caption", str(error)))
        return
    listing.add(Item(str(path), prompt, path.read_bytes), needs)


def _no_file(path: Path) -> str:
    """Why a path in a folder is not a file that can be read."""
    if path.exists():
        return "it is a pipe, a socket or a device, not an image file"
    return "it is a link to a file that does not exist" if path.is_symlink() else "it was deleted"


def _join_partners(listing: Listing, place: Path | list[Path], partners: Partners) -> None:
    """Give each image the file of its name in the partners' folder, if there is one."""
    files: dict[str, Path] | None = None
    if partners.place is not None:
        if isinstance(place, list):
            raise UserError(
                f"{partners.key}: {listing.where} are shards, whose images have no files of the "
                "same name; give a folder or a table of images"
            )
        files = partners_in(partners.place, partners.key)
    items, listing.items = listing.items, []
    for number, item in enumerate(items):
        partner = None
        if files is not None and isinstance(place, Path):
            stem = stem_of(Path(item.name), place)
            if stem not in files:
                reason = f"{partners.key}: no image {clipped(stem)!r} in {partners.place}"
                listing.bad.append(BadItem(item.name, "missing partner", reason))
                continue
            listing.contents.append(files[stem])
            partner = files[stem].read_bytes
        listing.items.append(partners.joined(item, number, partner))


# ---- tables


def _table(
    place: Column, captions: str | None, needs: Needs, partners: Partners | None = None
) -> Listing:
    """The images in a column of a table, with captions or labels from another column."""
    where = f"data.source: '{place.hf}:{place.column}'"
    table = open_table(place.hf, place.split, where)
    table.check_column(place.column, where)
    if needs and captions is None:
        raise UserError(f"data.captions: missing; name the column of {where} that holds {needs}s")
    if (other := partners and partners.place) is not None:
        table.check_column(other, partners.key if partners else "")
    prompts: list[Any] = [None] * table.size
    listing = Listing(where, contents=[table.contents])
    if captions is not None:
        table.check_column(captions, "data.captions")
        prompts = table.values(captions)
        listing.numbered = table.numbered(captions)
    for row, prompt in enumerate(prompts):
        text = prompt.strip() if isinstance(prompt, str) else prompt
        item = Item(f"{table.name}[{row}]", text, partial(_cell, table, row, place.column))
        if partners is not None:
            partner = None if other is None else partial(_cell, table, row, other)
            item = partners.joined(item, row, partner)
        listing.add(item, needs)
    return listing


def _cell(table: Table, row: int, column: str) -> bytes:
    """An image's bytes: the cell's own, or those of the file that it names."""
    value = table.cell(row, column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return (table.root / value).read_bytes()
    raise ValueError(f"its cell holds no image but {type(value).__name__}")
