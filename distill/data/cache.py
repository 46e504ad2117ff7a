"""Caches of encoded data: safetensors shards in a folder whose name is a hash of their sources.

The sources are the codec (weights and configuration), the teacher's source, the image sizes and the
items' contents. If one changes, so does the folder, and no cache is ever stale. A shard depends
only on its items, and is written under another name, flushed and renamed. A build that was killed
therefore continues at the first missing shard, and ends with the same bytes. Several processes
build a part of the shards each.
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
from distill.data.conditions.masks import VERSION as MASKS
from distill.data.encode import (
    TOGETHER,
    Encoding,
    EncodingJob,
    NotFinite,
    bucket_seed,
    encode_in_memory,
    encoders_on,
    images_at_once,
    join_buckets,
    parts,
    split,
)
from distill.data.fingerprint import fingerprint
from distill.data.listing import BadItem, Item, write_report
from distill.data.stream import Items, Source
from distill.files import write
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.prompt_limits import Cuts
from teachers.storage.files import home, is_complete, save_whole

FORMAT = 3  # of shards, and of how images are read; a new number makes all caches anew
SHARD_BYTES = 1 << 28  # about the size of one file
SHARD_ITEMS = 2048  # at most, in one file: the items that a killed build loses
INDEX, NULL, DIGESTS = "index.json", "null.safetensors", "digests.json"
GB = 1e9


def source(job: EncodingJob, data: DataSection, seed: int) -> Source:
    """The encoded items: in memory if they fit and no cache has them, else from their cache.

    The cache is built first if it is not complete.

    Raises:
        UserError: too many items are bad, or the cache would be over its limit.
    """
    root = home(data.cache, "data.cache")
    if job.bytes > data.in_memory_gb * GB:
        return fill(job, data).open(seed, data.skip_share)
    if root.is_dir() and (cache := Cache(job, root)).ready:
        return cache.open(seed, data.skip_share)
    return encode_in_memory(job, seed, data.skip_share)


def fill(job: EncodingJob, data: DataSection) -> Cache:
    """The job's cache, after building what is missing; prints the size first.

    Raises:
        UserError: as `check_room` and `Cache.build`.
    """
    root = home(data.cache, "data.cache")
    count = len(job.listing.items)
    console.print_line(f"{count:,} items, {job.bytes / GB:.3g} GB once encoded")
    check_room(job, root, data.cache_limit_gb)
    cache = Cache(job, root)
    if cache.ready:
        console.print_line(f"already cached in {cache.folder}")
    else:
        console.consume_with_bar(
            cache.build(data.skip_share), count, f"encoding into {cache.folder}"
        )
    return cache


class Shard(NamedTuple):
    """A file of a cache, and its items."""

    file: str
    bucket: int
    items: list[Item]


class ShardNotes(NamedTuple):
    """Facts about the items of a shard, stored in the file's metadata.

    bad: The items that are left out.
    first_frames: Names of images with several frames, of which only the first is read.
    cuts: Prompts that were longer than the text encoder reads.
    """

    bad: list[BadItem]
    first_frames: list[str]
    cuts: Cuts

    def add(self, other: ShardNotes | Encoding) -> None:
        self.bad.extend(other.bad)
        self.first_frames.extend(other.first_frames)
        self.cuts.add(other.cuts)


def check_room(job: EncodingJob, root: Path, limit_gb: float) -> None:
    """Refuse a cache that would be too large, before anything is written.

    Raises:
        UserError: the cache exceeds the limit or the free space, or its folder is not writable.
    """
    count, gb = len(job.listing.items), job.bytes / GB
    if gb > limit_gb:
        each = job.bytes / max(count, 1) / 1e6
        raise UserError(
            f"data.cache_limit_gb: {count:,} items of {each:.3g} MB make a cache of {gb:.3g} GB, "
            f"over the limit of {limit_gb:g} GB; raise it, or use fewer items"
        )
    parent = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"data.cache: {root}: {parent} is not a writable folder; name another")
    if (free := shutil.disk_usage(parent).free / GB) < gb:
        raise UserError(
            f"data.cache: {root} has {free:.3g} GB left and the cache takes {gb:.3g}; "
            "name a folder on another disk"
        )


class Cache:
    """The encoded items of one job, on the disk.

    Args:
        root: The folder of all caches.
    """

    def __init__(self, job: EncodingJob, root: Path) -> None:
        self.job, self.root = job, root
        self.digests = _Digests(root)
        self.shards = list(_shards(job))
        self.about = {
            "format": FORMAT,
            "teacher": job.teacher.source,
            "encoder": fingerprint(job.teacher),
            "items": self._items(),
            "sizes": job.sizes if job.with_data or job.pictured else [],
            "data": job.with_data,
            "shards": [(s.bucket, len(s.items)) for s in self.shards],
            **_split(job),
            **({"masks": MASKS} if job.pictured else {}),
        }
        text = json.dumps(self.about, sort_keys=True)
        self.folder = root / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _items(self) -> str:
        """A hash of the items: their captions, drawn masks, and the bytes of their files."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.job.listing.items:
            digest.update(f"{item.prompt!r}\n".encode())
            if isinstance(item.mask, int):
                digest.update(f"mask {item.mask}\n".encode())
        if self.job.with_data or self.job.pictured:
            for content in self.digests(self.job.listing.contents):
                digest.update(f"{content}\n".encode())
        return digest.hexdigest()

    @property
    def ready(self) -> bool:
        """Whether the cache is complete."""
        files = (INDEX, NULL, *(s.file for s in self.shards))
        return all((self.folder / f).is_file() for f in files)

    def build(self, share: float) -> Iterator[int]:
        """Encode the missing shards; yields the number of finished items after each shard.

        Raises:
            UserError: more than `share` of the items are bad.
            NotFinite: the codec produced NaN or infinity; the cache is deleted.
        """
        try:
            yield from self._build(share)
        except NotFinite:  # a corrected codec or corrected items make another cache
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _build(self, share: float) -> Iterator[int]:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        listing, done = self.job.listing, 0
        with encoders_on(self.job.teacher, self.job.device):
            null = self.job.null()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.digests.save()
            bad = list(listing.bad)
            if not (self.folder / NULL).exists():
                _write(self.folder / NULL, null, ShardNotes([], [], Cuts()))
            for shard in self.shards[rank::world]:
                if not is_complete(self.folder / shard.file):
                    self._encode(shard)
                bad += _notes_of(self.folder / shard.file).bad
                self._check(bad, share)
                done += len(shard.items)
                yield done
        while world > 1 and not all((self.folder / s.file).is_file() for s in self.shards):
            time.sleep(0.2)  # until the other processes finish; if one fails, all end
        notes = self._all_notes()
        self._check(notes.bad, share)
        write_report(self.folder, listing.report(listing.total, notes.bad, notes.first_frames))
        for draft in self.folder.glob(".shard-*"):  # of builds that were killed
            draft.unlink(missing_ok=True)
        draft = self.folder / f".{INDEX}.{os.getpid()}"
        draft.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.folder / INDEX)

    def _encode(self, shard: Shard) -> None:
        groups: list[dict[str, Tensor]] = []
        notes = ShardNotes([], [], Cuts())
        for group in parts(shard.items):
            encoding = self.job.encode(group)
            notes.add(encoding)
            if encoding.tensors:
                groups.append(encoding.tensors)
        tensors = {k: torch.cat([g[k] for g in groups]) for k in groups[0]} if groups else {}
        _write(self.folder / shard.file, tensors, notes)

    def _all_notes(self) -> ShardNotes:
        """The notes of all shards, in the items' order."""
        total = ShardNotes(list(self.job.listing.bad), [], Cuts())
        for shard in self.shards:
            total.add(_notes_of(self.folder / shard.file))
        return total

    def _check(self, bad: list[BadItem], share: float) -> None:
        listing = self.job.listing
        if len(bad) > share * listing.total:
            write_report(self.folder, listing.report(listing.total, bad, []))
        listing.check(bad, listing.total, share)

    def open(self, seed: int, share: float) -> Source:
        """The complete cache as a source; a batch reads its rows from memory-mapped files.

        Prints how many prompts were cut, and of how many images only the first frame was read.

        Raises:
            UserError: a file is damaged, or more than `share` of the items are bad.
        """
        listing, notes = self.job.listing, self._all_notes()
        listing.check(notes.bad, listing.total, share)
        self.job.print_notes(notes.first_frames, notes.cuts)
        sources: list[Source] = []
        for bucket in self.job.groups:
            files = [self.folder / s.file for s in self.shards if s.bucket == bucket]
            names, shape = list(self.job.shapes(bucket)), self.job.datum(bucket)
            cached = Cached(files, names, shape, bucket_seed(seed, bucket))
            cached.prompts = self._prompts(bucket, cached.size)
            sources.append(cached)
        return join_buckets(
            sources, seed, listing.report(listing.total, notes.bad, notes.first_frames)
        )

    def _prompts(self, bucket: int, rows: int) -> list[Any]:
        """The prompt or label of each of a bucket's rows; files keep only which items are bad.

        The folder's name has a hash of all prompts, so the listed ones are those of the rows.

        Raises:
            UserError: the files have another number of rows.
        """
        prompts: list[Any] = []
        for shard in self.shards:
            if shard.bucket == bucket:
                bad = {b.name for b in _notes_of(self.folder / shard.file).bad}
                prompts += [i.prompt for i in shard.items if i.name not in bad]
        if len(prompts) != rows:
            raise UserError(
                f"data.cache: {self.folder} has {rows:,} rows for {len(prompts):,} prompts; delete "
                "it, and the next run makes it again"
            )
        return prompts

    def null(self) -> Cond:
        """The null condition, each entry (1, ...); the text encoder is not needed."""
        with _open(self.folder / NULL) as file:
            return {k: file.get_tensor(k) for k in file.keys()} or None  # noqa: SIM118


class Cached(Source):
    """Encoded data in safetensors files, with the items in order.

    Args:
        files: The shards, in order.
        names: The names of the tensors in each file.
        shape: The shape of one datum, without the batch.
    """

    def __init__(
        self, files: list[Path], names: list[str], shape: tuple[int, ...], seed: int
    ) -> None:
        rows = [_rows(file, names[0]) for file in files]
        super().__init__(shape, None, None, seed, sum(rows))
        self.files, self.names = files, names
        self.starts = [sum(rows[:i]) for i in range(len(rows))]
        self._open = lru_cache(128)(_open)

    def take(self, index: Tensor) -> Items:
        return Items(*split(self.rows_of(index)))

    def rows_of(self, index: Tensor) -> dict[str, Tensor]:
        """The rows (B, ...) of each tensor with the numbers `index` (B,)."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for item in index.tolist():
            number = bisect.bisect_right(self.starts, item) - 1
            row = item - self.starts[number]
            for name in self.names:
                tensor = self._open(self.files[number]).get_slice(name)
                rows[name].append(tensor[row : row + 1])
        return {k: torch.cat(v) for k, v in rows.items()}


class _Digests:
    """Hashes of files, stored with the files' sizes and modification times."""

    def __init__(self, root: Path) -> None:
        self.file = root / DIGESTS
        try:
            tree = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            tree = {}
        # Entries in another form than `save` writes are dropped, and these files hashed again.
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
        except OSError as error:  # deleted or locked; reading the item reports it by name
            return f"{content}: {error.strerror}"

    def _of_file(self, content: Path) -> str:
        stat = content.stat()
        name, version = str(content.absolute()), [stat.st_size, stat.st_mtime_ns]
        entry = self.known.get(name)
        if entry is None or entry[:2] != version:
            with content.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            entry = self.known[name] = [*version, digest.hexdigest()]
            self.new = True
        return str(entry[2])

    def save(self) -> None:
        if self.new:
            write(self.file, json.dumps(self.known))


def _is_digest(entry: Any) -> bool:
    """Whether an entry of DIGESTS is [size, modification time, hash]."""
    return isinstance(entry, list) and [type(v) for v in entry] == [int, int, str]


def _split(job: EncodingJob) -> dict[str, Any]:
    """How the job divides groups of images, on which the last digits of latents depend.

    Empty where it divides none, as before it could, so that such caches stay valid.
    """
    at_once = [images_at_once(job.teacher, *size) for size in job.sizes if job.with_data]
    return {"images_at_once": at_once} if any(n < TOGETHER for n in at_once) else {}


def _shards(job: EncodingJob) -> Iterator[Shard]:
    """The job's items divided into files, each of one bucket and of whole groups of TOGETHER."""
    number = 0
    for bucket, items in job.groups.items():
        each = max(1, job.bytes // max(1, len(job.listing.items)))
        rows = min(SHARD_ITEMS, max(TOGETHER, SHARD_BYTES // each // TOGETHER * TOGETHER))
        for group in parts(items, rows):
            yield Shard(f"shard-{number:05d}.safetensors", bucket, group)
            number += 1


def _write(path: Path, tensors: dict[str, Tensor], notes: ShardNotes) -> None:
    """Write a shard completely or not at all."""
    # In one key, because the order of several keys is not kept.
    tree = {"bad": notes.bad, "firsts": notes.first_frames, "cuts": asdict(notes.cuts)}
    try:
        save_whole(tensors, path, {"notes": json.dumps(tree)})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"data.cache: {path} cannot be written ({error}); free some space, and "
            "the next run continues there"
        ) from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"data.cache: {path} is missing or damaged ({error}); delete it, and the next run "
            "makes it again"
        ) from None


def _notes_of(path: Path) -> ShardNotes:
    with _open(path) as file:
        tree = json.loads(file.metadata()["notes"])
    return ShardNotes(
        [BadItem(*b) for b in tree["bad"]], tree["firsts"], Cuts.of_tree(tree["cuts"])
    )


def _rows(path: Path, name: str) -> int:
    with _open(path) as file:
        return file.get_slice(name).get_shape()[0] if name in file.keys() else 0  # noqa: SIM118
