"""Caches of encoded data: sharded safetensors in a folder named after all that they depend on.

The name is a hash of the codec (its weights and configuration), the teacher's source, the image
sizes, and the items' contents, so that a change of any makes another cache and none is ever stale.
Shards are written aside, flushed and renamed, each a function of its items alone: a build that was
killed goes on at the first shard that is missing, and ends with the same bytes. With several
processes each builds its share.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill import console
from distill.config.schema import DataSection
from distill.data.encode import (
    TOGETHER,
    NotFinite,
    Work,
    bucket_seed,
    encoders_on,
    held,
    joined,
    parts,
    split,
)
from distill.data.fingerprint import fingerprint
from distill.data.listing import Bad, Item, write_report
from distill.data.stream import Items, Source
from distill.files import write
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.prompt_limits import Cuts
from teachers.storage.files import home, save_tensors

FORMAT = 3  # of the shards, and of how images are read; a new one makes every cache anew
SHARD_BYTES = 1 << 28  # about what one file holds
SHARD_ITEMS = 2048  # and at most so many items, which is what a kill can lose
INDEX, NULL, DIGESTS = "index.json", "null.safetensors", "digests.json"
GB = 1e9


def source(work: Work, data: DataSection, seed: int) -> Source:
    """The work's results: from its cache if there is one, else from memory if they fit, else from
    a cache that is built now.

    Raises:
        UserError: too many items are bad, or the cache would be over its limit.
    """
    root = home(data.cache, "data.cache")
    if work.bytes > data.in_memory_gb * GB:
        return fill(work, data).open(seed, data.skip_share)
    if root.is_dir() and (cache := Cache(work, root)).ready:
        return cache.open(seed, data.skip_share)
    return held(work, seed, data.skip_share)


def fill(work: Work, data: DataSection) -> Cache:
    """The work's cache, built where it is not whole yet; says its size first.

    Raises:
        UserError: as `check_room` and `Cache.build` do.
    """
    root = home(data.cache, "data.cache")
    count = len(work.listing.items)
    console.say(f"{count:,} items, {work.bytes / GB:.3g} GB once encoded")
    check_room(work, root, data.cache_limit_gb)
    cache = Cache(work, root)
    if cache.ready:
        console.say(f"cached already in {cache.folder}")
    else:
        console.follow(cache.build(data.skip_share), count, f"encoding into {cache.folder}")
    return cache


class Shard(NamedTuple):
    """A file of a cache, and the items that it is made of."""

    file: str
    bucket: int
    items: list[Item]


class Notes(NamedTuple):
    """What a file of a cache says beside its tensors, of the items that it is made of.

    bad: Those that are left out.
    firsts: Names of images of which the first of several frames was read.
    cuts: Prompts that were not read to their end.
    """

    bad: list[Bad]
    firsts: list[str]
    cuts: Cuts


def check_room(work: Work, root: Path, limit_gb: float) -> None:
    """Refuse a cache that would be too large, before anything is written.

    Raises:
        UserError: it is over the limit, the disk has no such room, or is not to be written to.
    """
    count, gb = len(work.listing.items), work.bytes / GB
    if gb > limit_gb:
        each = work.bytes / max(count, 1) / 1e6
        raise UserError(
            f"data.cache_limit_gb: {count:,} items of {each:.3g} MB make a cache of {gb:.3g} GB, "
            f"over the limit of {limit_gb:g}; raise it, or use fewer items"
        )
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"data.cache: {root}: {there} is not a folder that can be written to")
    if (free := shutil.disk_usage(there).free / GB) < gb:
        raise UserError(
            f"data.cache: {root} has {free:.3g} GB left and the cache takes {gb:.3g}; "
            "name a folder on another disk"
        )


class Cache:
    """One piece of work, encoded on the disk.

    Args:
        root: The folder of all caches.
    """

    def __init__(self, work: Work, root: Path) -> None:
        self.work, self.root = work, root
        self.digests = _Digests(root)
        self.shards = list(_shards(work))
        self.about = {
            "format": FORMAT,
            "teacher": work.teacher.source,
            "encoder": fingerprint(work.teacher),
            "items": self._items(),
            "sizes": work.sizes if work.with_data else [],
            "data": work.with_data,
            "shards": [(s.bucket, len(s.items)) for s in self.shards],
        }
        text = json.dumps(self.about, sort_keys=True)
        self.folder = root / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _items(self) -> str:
        """A hash of what the items are: their captions, and the bytes of their files."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.work.listing.items:
            digest.update(f"{item.prompt!r}\n".encode())
        if self.work.with_data:
            for content in self.digests(self.work.listing.contents):
                digest.update(f"{content}\n".encode())
        return digest.hexdigest()

    @property
    def ready(self) -> bool:
        """Whether it is whole."""
        files = (INDEX, NULL, *(s.file for s in self.shards))
        return all((self.folder / f).is_file() for f in files)

    def build(self, share: float) -> Iterator[int]:
        """Encode what is missing; after each shard, the number of items that are done.

        Raises:
            UserError: more than `share` of the items are bad.
            NotFinite: the codec made NaN or infinity; nothing is left of the cache.
        """
        try:
            yield from self._build(share)
        except NotFinite:  # another codec or other items make another cache: this one is of no use
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _build(self, share: float) -> Iterator[int]:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        listing, done = self.work.listing, 0
        with encoders_on(self.work.teacher, self.work.device):
            null = self.work.null()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.digests.save()
            bad = list(listing.bad)
            if not (self.folder / NULL).exists():
                _write(self.folder / NULL, null, Notes([], [], Cuts()))
            for shard in self.shards[rank::world]:
                if not _whole(self.folder / shard.file):
                    self._encode(shard)
                bad += _notes(self.folder / shard.file).bad
                self._check(bad, share)
                done += len(shard.items)
                yield done
        while world > 1 and not all((self.folder / s.file).is_file() for s in self.shards):
            time.sleep(0.2)  # the others' shards; a process that fails ends all
        notes = self._noted()
        self._check(notes.bad, share)
        write_report(self.folder, listing.report(listing.total, notes.bad, notes.firsts))
        for left in self.folder.glob(".shard-*"):  # drafts of builds that were killed
            left.unlink(missing_ok=True)
        write(self.folder / INDEX, json.dumps(self.about, indent=2) + "\n")

    def _encode(self, shard: Shard) -> None:
        found: list[dict[str, Tensor]] = []
        notes = Notes([], [], Cuts())
        for some in parts(shard.items):
            made = self.work.encode(some)
            notes.bad.extend(made.bad)
            notes.firsts.extend(made.firsts)
            notes.cuts.add(made.cuts)
            if made.tensors:
                found.append(made.tensors)
        full = {k: torch.cat([f[k] for f in found]) for k in found[0]} if found else {}
        _write(self.folder / shard.file, full, notes)

    def _noted(self) -> Notes:
        """What all files say, in the items' order."""
        found = Notes(list(self.work.listing.bad), [], Cuts())
        for shard in self.shards:
            notes = _notes(self.folder / shard.file)
            found.bad.extend(notes.bad)
            found.firsts.extend(notes.firsts)
            found.cuts.add(notes.cuts)
        return found

    def _check(self, bad: list[Bad], share: float) -> None:
        listing = self.work.listing
        if len(bad) > share * listing.total:
            write_report(self.folder, listing.report(listing.total, bad, []))
        listing.check(bad, listing.total, share)

    def open(self, seed: int, share: float) -> Source:
        """The whole cache as a source; files are mapped, and read where a batch needs them.

        Says, as data held in memory do, what was cut and of which images one frame was read.

        Raises:
            UserError: a file is damaged, or more than `share` of the items were bad.
        """
        listing, notes = self.work.listing, self._noted()
        listing.check(notes.bad, listing.total, share)
        self.work.tell(notes.firsts, notes.cuts)
        sources: list[Source] = []
        for bucket in self.work.groups:
            files = [self.folder / s.file for s in self.shards if s.bucket == bucket]
            shapes = self.work.shapes(bucket)
            shape = shapes.get("x", self.work.teacher.shape)
            sources.append(Cached(files, list(shapes), shape, bucket_seed(seed, bucket)))
        return joined(sources, seed, listing.report(listing.total, notes.bad, notes.firsts))

    def null(self) -> Cond:
        """The null condition, each entry (1, ...), without the text encoder."""
        with _opened(self.folder / NULL) as file:
            return {k: file.get_tensor(k) for k in file.keys()} or None  # noqa: SIM118


class Cached(Source):
    """Encoded data in safetensors files, which together hold the items in order.

    Args:
        names: Of the tensors in each.
        shape: Of one datum.
    """

    def __init__(
        self, files: list[Path], names: list[str], shape: tuple[int, ...], seed: int
    ) -> None:
        rows = [_rows(file, names[0]) for file in files]
        super().__init__(shape, None, None, seed, sum(rows))
        self.files, self.names = files, names
        self.starts = [sum(rows[:i]) for i in range(len(rows))]
        self._file = lru_cache(128)(_opened)

    def take(self, index: Tensor) -> Items:
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for item in index.tolist():
            number = bisect.bisect_right(self.starts, item) - 1
            row = item - self.starts[number]
            for name in self.names:
                rows = self._file(self.files[number]).get_slice(name)
                found[name].append(rows[row : row + 1])
        return Items(*split({k: torch.cat(v) for k, v in found.items()}))


class _Digests:
    """Hashes of files, remembered by their size and time of change."""

    def __init__(self, root: Path) -> None:
        self.file = root / DIGESTS
        try:
            tree = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            tree = {}
        # What is not as `save` wrote it is forgotten, and those files are hashed again.
        entries = tree.items() if isinstance(tree, dict) else ()
        self.known: dict[str, list[Any]] = {k: v for k, v in entries if _is_digest(v)}
        self.new = False

    def __call__(self, contents: list[Path | str]) -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self._of, contents))

    def _of(self, content: Path | str) -> str:
        if isinstance(content, str):
            return content
        try:
            return self._of_file(content)
        except OSError as error:  # it may be gone or locked; reading it says so by its name
            return f"{content}: {error.strerror}"

    def _of_file(self, content: Path) -> str:
        stat = content.stat()
        name, mark = str(content.absolute()), [stat.st_size, stat.st_mtime_ns]
        if (found := self.known.get(name)) is None or found[:2] != mark:
            with content.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            found = self.known[name] = [*mark, digest.hexdigest()]
            self.new = True
        return str(found[2])

    def save(self) -> None:
        if self.new:
            write(self.file, json.dumps(self.known))


def _is_digest(entry: Any) -> bool:
    """Whether an entry of DIGESTS is [size, time of change, hash]."""
    return isinstance(entry, list) and [type(v) for v in entry] == [int, int, str]


def _shards(work: Work) -> Iterator[Shard]:
    """The work cut into files, each of one bucket and of whole groups of TOGETHER."""
    number = 0
    for bucket, items in work.groups.items():
        each = max(1, work.bytes // max(1, len(work.listing.items)))
        rows = min(SHARD_ITEMS, max(TOGETHER, SHARD_BYTES // each // TOGETHER * TOGETHER))
        for some in parts(items, rows):
            yield Shard(f"shard-{number:05d}.safetensors", bucket, some)
            number += 1


def _write(path: Path, tensors: dict[str, Tensor], notes: Notes) -> None:
    """A shard, whole or absent."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    try:
        # One key, as the order of several is not kept.
        tree = {"bad": notes.bad, "firsts": notes.firsts, "cuts": asdict(notes.cuts)}
        save_tensors(tensors, draft, {"notes": json.dumps(tree)})
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (SafetensorError, OSError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(
            f"data.cache: {path} cannot be written ({error}); make room, and it goes on from there"
        ) from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"data.cache: {path} is missing or damaged ({error}); delete it, and it is made again"
        ) from None


def _whole(path: Path) -> bool:
    """Whether a shard is there and of its full length, which its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _notes(path: Path) -> Notes:
    with _opened(path) as file:
        tree = json.loads(file.metadata()["notes"])
    return Notes([Bad(*b) for b in tree["bad"]], tree["firsts"], Cuts.of_tree(tree["cuts"]))


def _rows(path: Path, name: str) -> int:
    with _opened(path) as file:
        return file.get_slice(name).get_shape()[0] if name in file.keys() else 0  # noqa: SIM118
