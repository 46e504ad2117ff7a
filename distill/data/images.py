"""Images with their captions or labels, listed from folders, WebDataset shards and tables.

What is listed here is read later, by `pictures.py`. A list's order follows from names alone.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distill.config.schema import Column
from distill.console import print_notice
from distill.data import imagefolder
from distill.data.listing import Bad, Item, Listing, Needs
from distill.data.tables import SUFFIXES as TABLES
from distill.data.tables import Table, checked, column_in, kind_of, lookup, open_table
from eval.images import (
    files_in,
    is_hidden,
    is_image,
    is_unread,
    suffixes,
    unread_suffixes,
)
from eval.text import decoded, json_value
from teachers.errors import UserError
from teachers.storage.files import home

CAPTION_KEYS = ("caption", "text", "prompt")  # of a JSON sidecar, unless it is told
PACKED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
MOST_SHARDS = 1_000_000  # that a pattern may name
UNREAD = "its format is not read; save it as PNG or JPEG"


def list_images(
    place: str | Column, captions: str | None, classes: int, captioned: bool
) -> Listing:
    """What `data.source` names.

    Args:
        place: A folder of images, .tar shards (a file, a folder of them, or a pattern with * or
            {0000..0099}), "DATASET:COLUMN", or the same in a mapping.
        captions: Where captions are: "txt" or "json:KEY" beside each image, "folder" for the
            name of the folder it is in, or a table's column. By default .txt, then .json.
        classes: How many labels a class-conditional teacher knows, else 0.
        captioned: Whether the teacher reads text.

    Raises:
        UserError: nothing is there, or no folder of classes where labels are asked for.
    """
    found, needs = place_of_images(place), needs_of(classes, captioned)
    if isinstance(found, Column):
        listing = _table(found, captions, needs)
    else:
        where = f"data.source: {place!r}"
        try:
            if isinstance(found, list):
                listing = _webdataset(found, where, captions, needs)
                beside = home(str(place), "data.source")
                if beside.is_dir():
                    _beside_shards(listing, beside, found)
            else:
                listing = _folder(found, where, captions, needs)
        except OSError as error:
            which, why = error.filename or "a file", error.strerror or error
            raise UserError(
                f"{where}: {which} cannot be read ({why}); see to its permissions"
            ) from None
    if not listing.total:
        raise UserError(f"{listing.where} holds no images{_instead(listing)}")
    listing.tell_left_out()
    return listing


def needs_of(classes: int, captioned: bool) -> Needs:
    """What data must come with for a teacher of so many classes, or one that reads text."""
    return "label" if classes else "caption" if captioned else ""


def _instead(listing: Listing) -> str:
    """What was found where there are no images, for the end of a line."""
    if not listing.left_out:
        return "; give a folder of files such as .png, .jpg and .webp, .tar shards, or a table"
    first = listing.left_out[0]
    return f", and of {len(listing.left_out)} other files {first.name} is first: {first.reason}"


def place_of_images(place: str | Column) -> Column | list[Path] | Path:
    """The table, the shards or the folder that `data.source` names; nothing is read.

    Raises:
        UserError: nothing is there, as far as can be told without asking the Hub.
    """
    with lookup("data.source", place):
        return _place(place)


def _place(place: str | Column) -> Column | list[Path] | Path:
    where = f"data.source: {place!r}"
    if isinstance(place, str):
        folder = home(place, "data.source")
        if (shards := _shards(place, where)) is not None:
            return shards
        if folder.is_dir():
            return folder
        if kind_of(folder) in TABLES and folder.is_file():
            raise UserError(f"{where} is a table; name its column of images: '{place}:COLUMN'")
        refusal = (
            f"{where} is not a folder; give 'digits', a folder of images, .tar shards, or "
            "'DATASET:COLUMN'"
        )
        place = column_in(place, refusal)
    return checked(place, "data.source")


# ---- folders


def _folder(folder: Path, where: str, captions: str | None, needs: Needs) -> Listing:
    """Without captions of its own, a class-conditional teacher's labels are the subfolders."""
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    if inner and not needs:
        print_notice(f"{where}: the teacher has no classes, so subfolders are not read as labels")
    labelled = needs == "label" and captions is None
    listing = Listing(where)
    if labelled:
        listing.folders = [p.name for p in inner]
        if not inner:
            raise UserError(
                f"{where} has 0 subfolders; for a class-conditional teacher, put the images of "
                "each class in a subfolder of its own, or give captions"
            )
        if all(p.name.isdecimal() for p in inner):
            inner.sort(key=lambda p: int(p.name))
    order = {p.name: i for i, p in enumerate(inner)}
    files = files_in(folder)
    if labelled:  # class by class, as their labels are
        files.sort(key=lambda p: (order.get(p.relative_to(folder).parts[0], -1), p))
    tables = imagefolder.tables(files, captions) if needs and not labelled else []
    told = imagefolder.told(tables, captions, where)
    sidecars = {} if tables or labelled or not needs else _sidecars(files)
    for path in sorted(told.keys() - set(files)):
        if not path.is_file():
            listing.bad.append(Bad(str(path), "missing image", "a table of captions names it"))
    for path in files:
        if not is_image(path):
            _leave(listing, path)
        elif labelled and path.parent == folder:
            reason = "it lies beside the class folders, and so has no label; move it into one"
            listing.left_out.append(Bad(str(path), "no class", reason))
        elif not path.is_file():
            listing.bad.append(Bad(str(path), "missing file", _no_file(path)))
        else:
            listing.contents.append(path)
            try:
                if labelled:
                    prompt = path.relative_to(folder).parts[0]
                elif tables:
                    prompt = told.get(path)
                else:
                    prompt = _beside(path, sidecars, captions, where) if needs else None
            except ValueError as error:
                listing.bad.append(Bad(str(path), "unreadable caption", str(error)))
                continue
            listing.add(Item(str(path), prompt, path.read_bytes), needs)
    return listing


def _no_file(path: Path) -> str:
    """Why a path in a folder is no file that can be read."""
    if path.exists():
        return "it is a pipe, a socket or a device, and no image file"
    return "it is a link to no file" if path.is_symlink() else "it is no longer there"


def _sidecars(files: Iterable[Path]) -> dict[Path, list[Path]]:
    """Files of captions by their path with the suffix in lower case."""
    found: dict[Path, list[Path]] = {}
    for file in files:
        if (suffix := kind_of(file)) in (".txt", ".json") and file.is_file():
            found.setdefault(file.with_suffix(suffix), []).append(file)
    return found


def _beside(path: Path, sidecars: dict[Path, list[Path]], captions: str | None, where: str) -> Any:
    """The caption of an image file, or None.

    Raises:
        ValueError: it cannot be read; the message says which file, and why.
    """
    if captions == "folder":
        return path.parent.name
    texts = {}
    for suffix in _kinds(captions, where):
        files = sidecars.get(path.with_suffix(f".{suffix}"), [])
        if len(files) > 1:
            raise ValueError(f"both {files[0].name} and {files[1].name} lie beside it; keep one")
        if files:
            texts[suffix] = (files[0].name, files[0].read_bytes())
    return _caption(texts, captions)


def _leave(listing: Listing, path: Path) -> None:
    """Note a file that is no item, if someone may take it for one."""
    if is_unread(path):
        listing.left_out.append(Bad(str(path), "format not read", UNREAD))
    elif path.name.lower().endswith(PACKED):
        reason = "an archive among images is not read; unpack it, or name shards as data.source"
        listing.left_out.append(Bad(str(path), "archive", reason))


def _beside_shards(listing: Listing, folder: Path, shards: list[Path]) -> None:
    """Note the images and archives in a folder of which the shards alone are read."""
    for path in files_in(folder):
        if is_image(path):
            reason = "it lies beside .tar shards, which alone are read; pack it, or move it away"
            listing.left_out.append(Bad(str(path), "beside shards", reason))
        elif path not in shards:
            _leave(listing, path)


def _kinds(captions: str | None, where: str) -> list[str]:
    kind = (captions or "").partition(":")[0]
    if kind == "metadata":
        raise UserError(
            f"data.captions: {captions!r}: {where.removeprefix('data.source: ')} holds no "
            "metadata.jsonl or metadata.csv"
        )
    if kind not in ("", "txt", "json", "folder"):
        raise UserError(
            f"data.captions: {captions!r}: for {where.removeprefix('data.source: ')} expected "
            "'txt', 'json:KEY', 'folder' or 'metadata:COLUMN'"
        )
    return [kind] if kind else ["txt", "json"]


def _caption(texts: dict[str, tuple[str, bytes]], captions: str | None) -> Any:
    """Of a sample's files by suffix, with name and content, what one says its caption is.

    Raises:
        ValueError: the file is not UTF-8, no JSON, or lacks or repeats a key; the message names it.
    """
    if "txt" in texts:
        return _decoded(*texts["txt"]).strip()
    if "json" not in texts:
        return None
    name, content = texts["json"]
    text = _decoded(name, content)
    try:
        tree = json_value(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    key = (captions or "").partition(":")[2]
    keys = (key,) if key else CAPTION_KEYS
    found = [tree[k] for k in keys if isinstance(tree, dict) and k in tree]
    if not found:
        raise ValueError(f"{name} holds no {' or '.join(map(repr, keys))}")
    return found[0].strip() if isinstance(found[0], str) else found[0]


def _decoded(name: str, content: bytes) -> str:
    try:
        return decoded(content)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


# ---- WebDataset shards


class Span(NamedTuple):
    """Where a member's bytes lie in a .tar file."""

    file: Path
    start: int
    size: int

    def read(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def _shards(place: str, where: str) -> list[Path] | None:
    """The .tar files that a place names, or None if it names none."""
    folder = home(place, "data.source")
    if folder.is_dir():
        return _visible(p for p in folder.iterdir() if kind_of(p) == ".tar") or None
    if kind_of(folder) != ".tar":
        return None
    found: list[Path] = []
    for name in _expanded(str(folder), where):
        path = Path(name)
        if "*" in name:
            try:
                found += _visible(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            except ValueError as error:  # such as a ** that is not all of a folder's name
                why = str(error).lower()
                raise UserError(
                    f"{where} is no pattern of files ({why}); write * within a name, and ** alone "
                    "for any folders"
                ) from None
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{where}: no such file: {path}")
    if not found:
        raise UserError(f"{where}: no file has such a name")
    return found


def _visible(found: Iterable[Path]) -> list[Path]:
    """Of what a pattern has found, the files that are no system's, in order."""
    return sorted(p for p in found if p.is_file() and not is_hidden(p.name))


def _expanded(pattern: str, where: str) -> list[str]:
    """Every name that {0000..0099} in a pattern stands for.

    Raises:
        UserError: they are more than could ever be read.
    """
    count = 1
    for first, last in re.findall(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern):
        count *= max(1, int(last) - int(first) + 1)
    if count > MOST_SHARDS or re.search(r"(\{|\.\.)\d{19,}(\.\.|\})", pattern):
        raise UserError(f"{where} names more than {MOST_SHARDS:,} files; narrow its ranges")
    return _names(pattern)


def _names(pattern: str) -> list[str]:
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = match.groups()
    before, after = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(first), int(last) + 1)
    return [n for i in numbers for n in _names(f"{before}{i:0{len(first)}d}{after}")]


def _webdataset(shards: list[Path], where: str, captions: str | None, needs: Needs) -> Listing:
    """Samples are members whose names agree up to their first dot; .cls holds a label."""
    listing = Listing(where, contents=list(shards))
    kinds = _kinds(captions, where) if needs == "caption" or captions else []
    for shard in shards:
        samples: dict[str, dict[str, Span]] = {}
        try:
            for name, span in _members(shard, listing):
                folder, _, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                spans = samples.setdefault(f"{folder}/{key}" if folder else key, {})
                if spans.setdefault(suffix.lower(), span) is not span:
                    raise UserError(f"{where}: {shard} holds {name} twice; pack each file once")
        except (tarfile.TarError, OSError, EOFError) as error:
            listing.bad.append(
                Bad(str(shard), "truncated shard", f"{error} after {len(samples)} samples")
            )
        for key, spans in samples.items():
            name = f"{shard}/{key}"
            image, *others = [k for k in spans if f".{k}" in suffixes()] or [None]
            if image is None:
                listing.bad.append(Bad(name, "missing image", _no_image(spans)))
                continue
            for other in others:
                reason = f"its sample has {key}.{image} before it; give each sample one image"
                listing.left_out.append(Bad(f"{name}.{other}", "second image", reason))
            try:
                prompt = _prompt(key, spans, kinds, captions, needs) if needs else None
            except ValueError as error:
                listing.bad.append(Bad(name, "unreadable caption", str(error)))
                continue
            listing.add(Item(name, prompt, spans[image].read), needs)
    return listing


def _prompt(
    key: str, spans: dict[str, Span], kinds: list[str], captions: str | None, needs: Needs
) -> Any:
    """The caption or the label of a sample.

    Raises:
        ValueError: it cannot be read.
    """
    if needs == "label" and captions is None:
        return _decoded(".cls", spans["cls"].read()).strip() if "cls" in spans else None
    if captions == "folder":
        return key.rpartition("/")[0].rpartition("/")[2]
    return _caption({k: (f".{k}", spans[k].read()) for k in kinds if k in spans}, captions)


def _no_image(spans: dict[str, Span]) -> str:
    """Why a sample has no image."""
    unread = next((k for k in spans if f".{k}" in unread_suffixes()), None)
    if unread is not None:
        return f"it has no image but .{unread}: {UNREAD}"
    return f"it has no image, such as .png or .jpg, but {', '.join(f'.{k}' for k in spans)}"


def _members(shard: Path, listing: Listing) -> Iterator[tuple[str, Span]]:
    """Names and places of a shard's files, but for hidden ones.

    Raises:
        tarfile.TarError: it ends too soon; what came before is good.
    """
    length = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.offset_data + member.size > length:
                raise tarfile.ReadError("unexpected end of data")
            if any(is_hidden(part) for part in member.name.split("/") if part.strip(".")):
                continue
            if member.isfile() and not member.issparse():
                yield member.name, Span(shard, member.offset_data, member.size)
            elif is_image(member.name) and not member.isdir():
                reason = "it is a link or sparse; pack the file itself (tar --hard-dereference -h)"
                listing.bad.append(Bad(f"{shard}/{member.name}", "link in a shard", reason))
        end = tar.offset
    with shard.open("rb") as file:  # cut between two members, it would look whole
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive mark")


# ---- tables


def _table(place: Column, captions: str | None, needs: Needs) -> Listing:
    where = f"data.source: '{place.hf}:{place.column}'"
    table = open_table(place.hf, place.split, where)
    table.need(place.column, where)
    if needs and captions is None:
        raise UserError(f"data.captions: missing; name the column of {where} that holds {needs}s")
    prompts: list[Any] = [None] * table.size
    listing = Listing(where, contents=[table.contents])
    if captions is not None:
        table.need(captions, "data.captions")
        prompts = table.values(captions)
        listing.numbered = table.numbered(captions)
    for row, prompt in enumerate(prompts):
        text = prompt.strip() if isinstance(prompt, str) else prompt
        read = partial(_cell, table, row, place.column)
        listing.add(Item(f"{table.name}[{row}]", text, read), needs)
    return listing


def _cell(table: Table, row: int, column: str) -> bytes:
    """An image's bytes: held by the cell, or in the file that it names."""
    value = table.cell(row, column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return (table.root / value).read_bytes()
    raise ValueError(f"its cell holds no image but {type(value).__name__}")
