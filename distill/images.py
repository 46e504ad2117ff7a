"""Images and their captions or labels, from folders, WebDataset shards and tables; and their cut.

What is listed here is read later, a few at a time. A list's order follows from names alone.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill import imagefolder
from distill.listing import Bad, Item, Listing
from distill.sections import Bucketing, Column
from distill.tables import SUFFIXES as TABLES
from distill.tables import Table, file_of, open_table
from distill.terminal import notice
from teachers.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel, or fewer
CAPTION_KEYS = ("caption", "text", "prompt")  # of a JSON sidecar, unless it is told
READERS = 8  # threads that read and decode
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
CORRUPT = "corrupt image"


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
        UserError: nothing is there, or there are more class folders than classes.
    """
    found = place_of_images(place)
    if isinstance(found, Column):
        return _table(found, captions, classes, captioned)
    where = f"data.source: {place!r}"
    if isinstance(found, list):
        return _webdataset(found, where, captions, classes, captioned)
    return _folder(found, where, captions, classes, captioned)


def place_of_images(place: str | Column) -> Column | list[Path] | Path:
    """The table, the shards or the folder that `data.source` names; nothing is read.

    Raises:
        UserError: nothing is there, as far as can be told without asking the Hub.
    """
    where = f"data.source: {place!r}"
    if isinstance(place, str):
        folder = Path(place).expanduser()
        if (shards := _shards(place, where)) is not None:
            return shards
        if folder.is_dir():
            return folder
        name, colon, column = place.rpartition(":")
        if not colon or not name or not column:
            if folder.suffix in TABLES and folder.is_file():
                raise UserError(f"{where} is a table; name its column of images: '{place}:COLUMN'")
            raise UserError(
                f"{where} is not a folder; give 'digits', a folder of images, .tar shards, or "
                "'DATASET:COLUMN'"
            )
        place = Column(hf=name, column=column)
    file_of(place.hf, f"data.source: '{place.hf}:{place.column}'")
    return place


# ---- folders


def _folder(
    folder: Path, where: str, captions: str | None, classes: int, captioned: bool
) -> Listing:
    """Without captions of its own, a class-conditional teacher's labels are the subfolders."""
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if all(p.name.isdecimal() for p in inner):
        inner.sort(key=lambda p: int(p.name))
    if inner and not classes and not captioned:
        notice(f"{where}: the teacher has no classes, so subfolders are not read as labels")
    labelled = bool(classes) and captions is None
    groups = inner if labelled else [folder]
    if labelled and not 1 <= len(groups) <= classes:
        raise UserError(
            f"{where} has {len(groups)} subfolders; the teacher knows {classes} classes, "
            "one subfolder each"
        )
    listing, wanted = Listing(where), captioned or bool(classes)
    if wanted and not labelled and (files := imagefolder.tables(folder, captions)):
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        return _some(imagefolder.listed(files, images, captions, where, wanted))
    for label, group in enumerate(groups):
        for path in sorted(p for p in group.rglob("*") if p.suffix.lower() in SUFFIXES):
            prompt = label if labelled else _sidecar(path, captions, where) if wanted else None
            listing.add(Item(str(path), prompt, path.read_bytes), wanted)
            listing.contents.append(path)
    return _some(listing)


def _sidecar(image: Path, captions: str | None, where: str) -> str | None:
    """The caption that lies beside an image, or None."""
    if captions == "folder":
        return image.parent.name
    texts = {s: _text(image.with_suffix(f".{s}")) for s in _kinds(captions, where)}
    return _caption(texts, captions)


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


def _text(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.is_file() else None


def _caption(texts: dict[str, str | None], captions: str | None) -> str | None:
    """Of a sample's texts by suffix, the one that is its caption."""
    if (text := texts.get("txt")) is not None:
        return text.strip()
    if (text := texts.get("json")) is None:
        return None
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    key = (captions or "").partition(":")[2]
    keys = (key,) if key else CAPTION_KEYS
    found = [tree[k] for k in keys if isinstance(tree, dict) and k in tree]
    return str(found[0]).strip() if found and found[0] is not None else None


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
    folder = Path(place).expanduser()
    if folder.is_dir():
        return sorted(folder.glob("*.tar")) or None
    if folder.suffix != ".tar":
        return None
    found: list[Path] = []
    for name in _expanded(str(folder)):
        path = Path(name)
        if "*" in name:
            found += sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{where}: no such file: {path}")
    if not found:
        raise UserError(f"{where}: no file has such a name")
    return found


def _expanded(pattern: str) -> list[str]:
    """Every name that {0000..0099} in a pattern stands for."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = match.groups()
    before, after = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(first), int(last) + 1)
    return [n for i in numbers for n in _expanded(f"{before}{i:0{len(first)}d}{after}")]


def _webdataset(
    shards: list[Path], where: str, captions: str | None, classes: int, captioned: bool
) -> Listing:
    """Samples are members whose names agree up to their first dot; .cls holds a label."""
    listing, wanted = Listing(where, contents=list(shards)), captioned or bool(classes)
    kinds = _kinds(captions, where) if captioned or captions else []
    for shard in shards:
        samples: dict[str, dict[str, Span]] = {}
        whole = _members(shard)
        try:
            for name, span in whole:
                folder, _, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                samples.setdefault(f"{folder}/{key}" if folder else key, {})[suffix.lower()] = span
        except (tarfile.TarError, OSError, EOFError) as error:
            listing.bad.append(
                Bad(str(shard), "truncated shard", f"{error} after {len(samples)} samples")
            )
        for key, spans in samples.items():
            image = next((v for k, v in spans.items() if f".{k}" in SUFFIXES), None)
            if image is None:
                reason = f"it has no image ({', '.join(sorted(SUFFIXES))})"
                listing.bad.append(Bad(f"{shard}/{key}", "missing image", reason))
                continue
            if classes and captions is None:
                prompt = (
                    spans["cls"].read().decode(errors="replace").strip() if "cls" in spans else None
                )
            elif captions == "folder":
                prompt = key.rpartition("/")[0].rpartition("/")[2]
            else:
                texts = {k: spans[k].read().decode(errors="replace") for k in kinds if k in spans}
                prompt = _caption(dict(texts), captions)
            listing.add(Item(f"{shard}/{key}", prompt, image.read), wanted)
    return _some(listing)


def _members(shard: Path) -> Iterator[tuple[str, Span]]:
    """Names and places of a shard's files.

    Raises:
        tarfile.TarError: it ends too soon; what came before is good.
    """
    length = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.offset_data + member.size > length:
                raise tarfile.ReadError("unexpected end of data")
            if member.isfile() and not member.issparse():
                yield member.name, Span(shard, member.offset_data, member.size)
        end = tar.offset
    with shard.open("rb") as file:  # cut between two members, it would look whole
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive mark")


# ---- tables


def _table(place: Column, captions: str | None, classes: int, captioned: bool) -> Listing:
    where = f"data.source: '{place.hf}:{place.column}'"
    table = open_table(place.hf, place.split, where)
    table.need(place.column, where)
    wanted = captioned or bool(classes)
    if wanted and captions is None:
        what = "captions" if captioned else "labels"
        raise UserError(f"data.captions: missing; name the column of {where} that holds {what}")
    prompts: list[Any] = [None] * table.size
    if captions is not None:
        table.need(captions, "data.captions")
        prompts = table.values(captions)
    listing = Listing(where, contents=[table.contents])
    for row, prompt in enumerate(prompts):
        text = prompt.strip() if isinstance(prompt, str) else prompt
        read = partial(_cell, table, row, place.column)
        listing.add(Item(f"{table.name}[{row}]", text, read), wanted)
    return _some(listing)


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


def _some(listing: Listing) -> Listing:
    if not listing.total:
        raise UserError(f"{listing.where} holds no images ({', '.join(sorted(SUFFIXES))})")
    return listing


# ---- pixels


def sizes_of(buckets: Bucketing | None, height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths to cut images to: the one asked for, or all of about its area.

    Buckets are, for every multiple that a side may be, it and the other side that brings the area
    nearest to height × width, either way round, with none more than `ratio` times the other.
    """
    if buckets is None:
        return [(height, width)]
    m, area = buckets.multiple, height * width
    if m > min(height, width):
        raise UserError(f"data.buckets.multiple: {m} is more than the image size of {height}")
    found: set[tuple[int, int]] = set()
    for side in range(m, math.isqrt(round(area * buckets.ratio)) + 1, m):
        other = max(m, round(area / side / m) * m)
        if max(side, other) <= buckets.ratio * min(side, other):
            found |= {(side, other), (other, side)}
    sizes = sorted(found)
    if not sizes:
        raise UserError(f"data.buckets: no sizes of multiples of {m} lie within {buckets.ratio:g}")
    return sizes


def into_buckets(listing: Listing, sizes: list[tuple[int, int]]) -> None:
    """Give every item the bucket whose aspect ratio is nearest to its image's."""
    if len(sizes) == 1:
        return
    logs = [math.log(h / w) for h, w in sizes]
    items, listing.items = listing.items, []
    with ThreadPoolExecutor(READERS) as pool:
        for item, aspect in zip(items, pool.map(aspect_of, items), strict=True):
            if isinstance(aspect, Bad):
                listing.bad.append(aspect)
                continue
            gaps = [abs(log - math.log(aspect)) for log in logs]
            listing.items.append(item._replace(bucket=gaps.index(min(gaps))))


def aspect_of(item: Item) -> float | Bad:
    """An image's height over its width, from its header."""
    from PIL import Image

    try:
        image = Image.open(_stream(item))
        turned = image.getexif().get(0x0112) in TURNED
        return image.width / image.height if turned else image.height / image.width
    except Exception as error:  # Pillow's range over many types for a bad file
        return _corrupt(item.name, error)


def pixels(item: Item, channels: int, height: int, width: int) -> Tensor | Bad:
    """An image (C, H, W) in uint8: upright, its shorter side resized to fit, its centre cropped."""
    from PIL import Image, ImageOps
    from torchvision.transforms import functional as tf

    try:
        image = Image.open(_stream(item))
        if image.mode not in MODES:
            raise ValueError(f"mode {image.mode}; save it with 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # as above
        return _corrupt(item.name, error)
    scale = max(height / image.height, width / image.width)
    size = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
    image = tf.center_crop(tf.resize(image, size, antialias=True), [height, width])  # pyright: ignore
    return tf.pil_to_tensor(image)  # pyright: ignore


def _stream(item: Item) -> io.BytesIO:
    assert item.image is not None, "prompts have no pixels"
    return io.BytesIO(item.image())


def _corrupt(name: str, error: Exception) -> Bad:
    reason = "its bytes are of no known kind" if "identify image" in str(error) else str(error)
    return Bad(name, CORRUPT, f"not a readable image ({reason or type(error).__name__})")


def signed(images: list[Tensor]) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of uint8 ones (C, H, W)."""
    return torch.stack(images).float() / 127.5 - 1
