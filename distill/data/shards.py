"""Images in WebDataset shards: .tar files whose members form samples by their names."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.captions import caption_in, sidecar_kinds, text_of
from distill.data.listing import UNREAD, BadItem, Item, Listing, Needs
from distill.data.tables import kind_of
from eval.images import files_in, is_hidden, is_image, suffixes, unread_suffixes
from teachers.errors import UserError
from teachers.storage.files import home

MOST_SHARDS = 1_000_000  # that a pattern may name


class Member(NamedTuple):
    """Where a member's bytes are in a .tar file: `size` bytes from `start`."""

    file: Path
    start: int
    size: int

    def read(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


Sample = dict[str, Member]  # by suffix, in lower case and without its dot


# ---- which shards


def shards_at(place: str, where: str) -> list[Path] | None:
    """The .tar files of a file, a folder or a pattern, or None if the place is none of these.

    Raises:
        UserError: no file has such a name, or the pattern is not valid.
    """
    folder = home(place, "data.source")
    if folder.is_dir():
        return _visible(p for p in folder.iterdir() if kind_of(p) == ".tar") or None
    if kind_of(folder) != ".tar":
        return None
    shards: list[Path] = []
    for name in _expanded(str(folder), where):
        if "*" in name:
            shards += _matching(Path(name), where)
        elif Path(name).is_file():
            shards.append(Path(name))
        else:
            raise UserError(f"{where}: no such file: {name}; add it, or narrow the pattern")
    if not shards:
        raise UserError(f"{where}: no file has such a name; give another pattern")
    return shards


def _matching(pattern: Path, where: str) -> list[Path]:
    """The files that match a pattern with *, in order."""
    try:
        return _visible(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except ValueError as error:  # such as a ** that is only a part of a folder's name
        reason = str(error).lower()
        raise UserError(
            f"{where} is no pattern of files ({reason}); write * within a name, and ** alone "
            "for any folders"
        ) from None


def _visible(paths: Iterable[Path]) -> list[Path]:
    """The files among some paths that are not hidden, in order."""
    return sorted(p for p in paths if p.is_file() and not is_hidden(p.name))


def _expanded(pattern: str, where: str) -> list[str]:
    """Every name that a pattern with ranges such as {0000..0099} stands for.

    Raises:
        UserError: there are more than MOST_SHARDS.
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


# ---- what is in them


def list_shards(shards: list[Path], where: str, captions: str | None, needs: Needs) -> Listing:
    """The samples of shards: members whose names agree up to their first dot.

    A label is in the member with suffix .cls, a caption in .txt or .json.

    Raises:
        UserError: a shard has two members of one name, or `data.captions` is not valid.
    """
    listing = Listing(where, contents=list(shards))
    kinds = sidecar_kinds(captions, where) if needs == "caption" or captions else []
    for shard in shards:
        for key, sample in _samples(shard, listing).items():
            name = f"{shard}/{key}"
            if (suffix := _image_suffix(name, key, sample, listing)) is None:
                continue
            try:
                prompt = _prompt(key, sample, kinds, captions, needs) if needs else None
            except ValueError as error:
                listing.bad.append(BadItem(name, "unreadable caption", str(error)))
                continue
            listing.add(Item(name, prompt, sample[suffix].read), needs)
    return listing


def note_files_beside(listing: Listing, folder: Path, shards: list[Path]) -> None:
    """Note the images and archives that are beside the shards of a folder and are not read."""
    for path in files_in(folder):
        if is_image(path):
            reason = "it lies beside .tar shards, and only these are read; pack it, or move it away"
            listing.left_out.append(BadItem(str(path), "beside shards", reason))
        elif path not in shards:
            listing.note_unread(path)


def _samples(shard: Path, listing: Listing) -> dict[str, Sample]:
    """The samples of a shard by name, up to where it is damaged; the damage is noted."""
    samples: dict[str, Sample] = {}
    try:
        for name, member in _members(shard, listing):
            folder, _, base = name.rpartition("/")
            key, _, suffix = base.partition(".")
            sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
            if sample.setdefault(suffix.lower(), member) is not member:
                raise UserError(f"{listing.where}: {shard} holds {name} twice; pack each file once")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = f"{error} after {len(samples)} samples"
        listing.bad.append(BadItem(str(shard), "truncated shard", reason))
    return samples


def _members(shard: Path, listing: Listing) -> Iterator[tuple[str, Member]]:
    """Names and places of a shard's files, without hidden ones.

    Raises:
        tarfile.TarError: the shard ends too early; the members before that are good.
    """
    length = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.offset_data + member.size > length:
                raise tarfile.ReadError("unexpected end of data")
            if any(is_hidden(part) for part in member.name.split("/") if part.strip(".")):
                continue
            if member.isfile() and not member.issparse():
                yield member.name, Member(shard, member.offset_data, member.size)
            elif is_image(member.name) and not member.isdir():
                reason = "it is a link or sparse; pack the file itself (tar --hard-dereference -h)"
                bad = BadItem(f"{shard}/{member.name}", "link in a shard", reason)
                listing.bad.append(bad)
        end = tar.offset
    with shard.open("rb") as file:  # a shard that is cut between two members has no end mark
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive mark")


def _image_suffix(name: str, key: str, sample: Sample, listing: Listing) -> str | None:
    """The suffix of a sample's first image; a sample with none or several is noted."""
    images = [suffix for suffix in sample if f".{suffix}" in suffixes()]
    if not images:
        listing.bad.append(BadItem(name, "missing image", _no_image(sample)))
        return None
    first, *others = images
    for other in others:
        reason = f"its sample has {key}.{first} before it; give each sample one image"
        listing.left_out.append(BadItem(f"{name}.{other}", "second image", reason))
    return first


def _no_image(sample: Sample) -> str:
    """Why a sample has no image."""
    unread = next((suffix for suffix in sample if f".{suffix}" in unread_suffixes()), None)
    if unread is not None:
        return f"it has no image but .{unread}: {UNREAD}"
    return f"it has no image, such as .png or .jpg, but {', '.join(f'.{k}' for k in sample)}"


def _prompt(key: str, sample: Sample, kinds: list[str], captions: str | None, needs: Needs) -> Any:
    """The caption or the label of a sample; None if it has none.

    Raises:
        ValueError: it cannot be read.
    """
    if needs == "label" and captions is None:
        return text_of(".cls", sample["cls"].read()).strip() if "cls" in sample else None
    if captions == "folder":
        return key.rpartition("/")[0].rpartition("/")[2]
    return caption_in({k: (f".{k}", sample[k].read()) for k in kinds if k in sample}, captions)
