"""Items encoded by a teacher's codec, a few at a time and always in the same groups.

The last digits of an encoded item can depend on the other items of its group. The groups therefore
depend only on the list, so that data in memory and data from a cache are equal bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.console import print_notice
from distill.data.fingerprint import networks
from distill.data.listing import BadItem, Item, Listing
from distill.data.pictures import READERS, Picture, picture, pictured, signed
from distill.data.stream import Buckets, Source
from distill.seeds import seed_of
from teachers.conditions import PICTURE, Pictured
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.prompt_limits import Cuts
from teachers.teacher import Teacher

TOGETHER = 16  # items that are encoded together
PIXELS = 2**20  # of the images that a VAE encodes at one time: one of 1024 × 1024, 16 of 256 × 256
COND = "cond."  # begins the names of encoded conditions; the name of data is "x"

Encoded = dict[str, Tensor]


class NotFinite(UserError):
    """A network of the codec produced NaN or infinity."""


class Encoding(NamedTuple):
    """Some items after encoding.

    tensors: (N, ...) on the CPU, of the N good items.
    bad: The other items.
    first_frames: Names of images with several frames, of which only the first is read.
    cuts: Prompts of good items that are longer than the text encoder reads.
    prompts: The N good items' prompts or labels.
    """

    tensors: Encoded
    bad: list[BadItem]
    first_frames: list[str]
    cuts: Cuts
    prompts: list[Any]


class ReadItem(NamedTuple):
    """An item that was read.

    pictures: Its image, if data are encoded, and the picture of its prompt, if it has one.
    prompt: As `Codec.condition` takes it.
    """

    pictures: list[Picture]
    prompt: Any


class EncodingJob:
    """Items, and how they are encoded.

    Args:
        listing: The items, each with its bucket.
        sizes: Height and width in pixels of each bucket.
        with_data: Whether images are encoded too, or only their prompts, with the pictures of these
            where the teacher takes them.

    Raises:
        UserError: an encoded image does not have the teacher's shape.
        NotFinite: it holds NaN or infinity.
    """

    def __init__(
        self, teacher: Teacher, listing: Listing, sizes: list[tuple[int, int]], with_data: bool
    ) -> None:
        self.teacher, self.listing, self.sizes = teacher, listing, sizes
        self.with_data = with_data
        self.pictured = bool(teacher.codec.pictures)
        self.device = device()
        self.channels = picture_shape(teacher)[0] if with_data else 0
        used = sorted({i.bucket for i in listing.items})
        self.groups = {b: [i for i in listing.items if i.bucket == b] for b in used}
        with encoders_on(teacher, self.device):
            self.samples = {b: self._sample(b) for b in used}
        self.bytes = sum(len(self.groups[b]) * self._size(b) for b in used)

    def _sample(self, bucket: int) -> Encoded:
        """The prompt of a bucket's first item and a grey image, encoded: they give the shapes."""
        images = None
        if self.with_data:
            images = torch.zeros(1, self.channels, *self.sizes[bucket])
        first = self.groups[bucket][0]
        prompt = first.prompt
        if self.pictured:
            prompt = Pictured.blank(prompt, *self.sizes[bucket])
        tensors = self._encoded(images, [prompt])
        name = f"a grey picture, and the prompt of {first.name}"
        check_finite(tensors, [name], self.teacher, self.listing.where)
        if self.with_data or self.pictured:
            self._check_shape(self._datum(bucket, tensors))
        return tensors

    def datum(self, bucket: int) -> tuple[int, ...]:
        """The shape of one datum, without the batch."""
        return self._datum(bucket, self.samples[bucket])

    def _datum(self, bucket: int, tensors: Encoded) -> tuple[int, ...]:
        if "x" in tensors:
            return tuple(tensors["x"].shape[1:])
        if not self.pictured:
            return self.teacher.shape
        channels, *sides = self.teacher.shape  # noise is as large as the pictures of the bucket
        _, *pixels = picture_shape(self.teacher)
        size = self.sizes[bucket]
        return (channels, *(n * s // p for n, s, p in zip(size, sides, pixels, strict=True)))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse data that the teacher does not take; with several buckets, sides may differ."""
        expected = tuple(self.teacher.shape)
        if len(self.sizes) == 1:
            fits = shape == expected
        else:
            fits = (shape[0], len(shape)) == (expected[0], 3)
        if not fits:
            given, needed = ("×".join(map(str, s)) for s in (shape, expected))
            raise UserError(
                f"{self.listing.where} is {given}; the teacher takes {needed}; remove data.size"
            )

    def _size(self, bucket: int) -> int:
        return sum(v[0].numel() * v.element_size() for v in self.samples[bucket].values())

    def shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, without the batch."""
        return {k: tuple(v.shape[1:]) for k, v in self.samples[bucket].items()}

    def encode(self, items: list[Item]) -> Encoding:
        """Encode at most TOGETHER items.

        Raises:
            NotFinite: a network of the codec produced NaN or infinity; the item is named.
        """
        bad: list[BadItem] = []
        images: list[Tensor] = []
        first_frames: list[str] = []
        good, prompts = items, [i.prompt for i in items]
        if self.with_data or self.pictured:
            good, prompts = [], []
            with ThreadPoolExecutor(READERS) as pool:
                for item, read in zip(items, pool.map(self._read, items), strict=True):
                    if isinstance(read, BadItem):
                        bad.append(read)
                        continue
                    good.append(item)
                    prompts.append(read.prompt)
                    first_frames += [item.name] * any(p.first for p in read.pictures)
                    images += [p.pixels for p in read.pictures[: self.with_data]]
        if not good:
            return Encoding({}, bad, [], Cuts(), [])
        x = signed(images) if self.with_data else None
        with counting(self.teacher) as cuts:
            tensors = self._encoded(x, prompts)
        check_finite(tensors, [i.name for i in good], self.teacher, self.listing.where)
        for name, shape in self.shapes(good[0].bucket).items():
            if tensors[name].shape[1:] != shape:
                raise UserError(
                    f"teacher {self.teacher.source!r}: its codec made {name} of shape "
                    f"{tuple(tensors[name].shape[1:])} after {shape}; pad it to one length"
                )
        return Encoding(tensors, bad, first_frames, cuts, [i.prompt for i in good])

    def null(self) -> Encoded:
        """The null condition, each entry (1, ...); empty if the codec has none.

        Raises:
            NotFinite: it holds NaN or infinity.
        """
        null = {f"{COND}{k}": v for k, v in (self.teacher.codec.null or {}).items()}
        check_finite(null, ["the empty or negative prompt"], self.teacher, self.listing.where)
        return {k.removeprefix(COND): v.detach().cpu() for k, v in null.items()}

    def print_notes(self, first_frames: list[str], cuts: Cuts) -> None:
        """Print how many images have further frames and how many prompts were cut, if any.

        Of several processes, only the first prints.
        """
        if first_frames and os.environ.get("RANK", "0") == "0":
            print_notice(
                f"{self.listing.where}: {len(first_frames):,} images have several frames or pages, "
                f"such as {first_frames[0]}; the first of each is read"
            )
        print_cuts(cuts, self.listing.where)

    @torch.no_grad()
    def _encoded(self, images: Tensor | None, prompts: list) -> Encoded:
        codec = self.teacher.codec
        tensors: Encoded = {}
        if images is not None:
            pieces = images.split(images_at_once(self.teacher, *images.shape[-2:]))
            tensors["x"] = torch.cat([codec.encode(v.to(self.device)) for v in pieces])
        cond = codec.condition(prompts)
        tensors |= {f"{COND}{k}": v for k, v in (cond or {}).items()}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

    def _read(self, item: Item) -> ReadItem | BadItem:
        size = self.sizes[item.bucket]
        pictures: list[Picture] = []
        if self.with_data:
            image = picture(item, self.channels, *size)
            if isinstance(image, BadItem):
                return image
            pictures.append(image)
        if not self.pictured:
            return ReadItem(pictures, item.prompt)
        # of one that is painted in, the image itself is the picture of the prompt
        same = pictures[0] if pictures and item.image is item.picture else None
        read = pictured(item, *size, same)
        return read if isinstance(read, BadItem) else ReadItem([*pictures, read[0]], read[1])


def images_at_once(teacher: Teacher, height: int, width: int) -> int:
    """How many images of a group the codec encodes at one time.

    A VAE's activations take gigabytes for one large image, more than training takes. Only stock
    pipelines' groups are divided: other codecs may draw latents at random for the whole group.
    """
    return at_once(height, width) if isinstance(teacher.codec, Prompted) else TOGETHER


def at_once(height: int, width: int) -> int:
    """How many images of a group a VAE encodes at one time."""
    return min(TOGETHER, max(1, PIXELS // (height * width)))


def check_finite(tensors: Encoded, names: list[str], teacher: Teacher, where: str) -> None:
    """Refuse encoded tensors that hold NaN or infinity.

    Args:
        tensors: Data "x" and conditions, each (N, ...).
        names: The names of the N items.
        where: Begins the message.

    Raises:
        NotFinite: naming the first such item, the network that produced it, and the remedy.
    """
    for key, value in tensors.items():
        if not value.is_floating_point() or torch.isfinite(value).all():
            continue
        rows = (~torch.isfinite(value)).reshape(len(value), -1).any(1)
        row = int(rows.nonzero()[0])
        kind = "NaN" if torch.isnan(value[row]).any() else "infinity"
        vae = teacher.codec.vae
        if key in ("x", f"{COND}{PICTURE}"):
            call, parts = "codec.encode", [] if vae is None else [vae]
        else:
            call = f"codec.condition, {key.removeprefix(COND)}"
            parts = [m for m in networks(teacher) if m is not vae]
        raise NotFinite(f"{where}: {names[row]}: {_cause(call, parts, kind, teacher)}")


def _cause(call: str, parts: list[nn.Module], kind: str, teacher: Teacher) -> str:
    """The network that made NaN or infinity in a call, and the remedy, for a message."""
    networks = ", ".join(type(m).__name__ for m in parts)
    fault = f"teacher {teacher.source!r} made {kind} of it in {call}"
    fault += f" ({networks})" if networks else ""
    for part in parts:
        if (weight := broken_weight(part)) is not None:
            return (
                f"{fault}: {type(part).__name__}'s weight {weight} is not finite; the files are "
                "damaged; download them again"
            )
    if any(p.dtype == torch.float16 for m in parts for p in m.parameters()):
        return f"{fault}: float16 overflows in it; load it in float32 or bfloat16"
    return f"{fault}; load it in float32, or remove this item"


def broken_weight(module: nn.Module) -> str | None:
    """The name of a network's first weight that holds NaN or infinity, or None."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            return name
    return None


@contextmanager
def counting(teacher: Teacher) -> Iterator[Cuts]:
    """Within it, count the prompts that the teacher's codec cuts; none for codecs without text."""
    if not isinstance(teacher.codec, Prompted) or teacher.codec.classes:
        yield Cuts()
        return
    with teacher.codec.counting() as cuts:
        yield cuts


def print_cuts(cuts: Cuts, where: str) -> None:
    """Print how many prompts each text encoder cut, if any; only in the first process."""
    if os.environ.get("RANK", "0") == "0":
        for line in cuts.lines(where):
            print_notice(line)


def split(tensors: Encoded) -> tuple[Tensor | None, Cond]:
    """Encoded tensors as data and condition."""
    cond = {k.removeprefix(COND): v for k, v in tensors.items() if k != "x"}
    return tensors.get("x"), cond or None


def parts(items: list[Item], size: int = TOGETHER) -> Iterator[list[Item]]:
    """The items, `size` at a time."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def encode_in_memory(job: EncodingJob, seed: int, share: float) -> Source:
    """Encode all items into memory.

    Raises:
        UserError: more than `share` of the items are bad.
        NotFinite: see `EncodingJob.encode`.
    """
    listing, bad = job.listing, list(job.listing.bad)
    total, first_frames, cuts = listing.total, [], Cuts()
    sources: list[Source] = []
    with encoders_on(job.teacher, job.device):
        job.null()
        for bucket, items in job.groups.items():
            tensors = {
                k: v.new_empty(len(items), *v.shape[1:]) for k, v in job.samples[bucket].items()
            }
            rows, prompts = 0, []
            for group in parts(items):
                encoding = job.encode(group)
                n = len(group) - len(encoding.bad)
                for name, value in encoding.tensors.items():
                    tensors[name][rows : rows + n] = value
                rows += n
                prompts += encoding.prompts
                bad += encoding.bad
                first_frames += encoding.first_frames
                cuts.add(encoding.cuts)
                listing.check(bad, total, share)
            x, cond = split({k: v[:rows] for k, v in tensors.items()})
            source = Source(job.datum(bucket), x, cond, bucket_seed(seed, bucket), rows)
            source.prompts = prompts
            sources.append(source)
    job.print_notes(first_frames, cuts)
    return join_buckets(sources, seed, listing.report(total, bad, first_frames))


def bucket_seed(seed: int, bucket: int) -> int:
    """The seed of a bucket's order and noise; the first bucket has the run's seed."""
    return seed_of(seed, "bucket", bucket) if bucket else seed


def join_buckets(sources: list[Source], seed: int, content: dict) -> Source:
    """One source of all buckets that are not empty, with the content of its report."""
    sources = [s for s in sources if s.size]
    if not sources:
        raise UserError("data: no item is good; set data.skip_share to 0 to see the first fault")
    source = sources[0] if len(sources) == 1 else Buckets(sources, seed)
    source.report = content
    return source


def picture_shape(teacher: Teacher) -> tuple[int, ...]:
    """Shape of what the teacher's codec decodes: images (C, H, W) or videos (C, F, H, W)."""
    if isinstance(teacher.codec, Prompted):  # it knows its size, and decoding may take long
        return (3, *teacher.codec.size)
    with torch.no_grad():
        return tuple(teacher.codec.decode(torch.zeros(1, *teacher.shape)).shape[1:])


def device() -> torch.device:
    """The device for networks outside training: the one that Accelerate trains on.

    ACCELERATE_TORCH_DEVICE names it; ACCELERATE_USE_CPU (true, yes, on or 1) means the CPU.
    """
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(name)
    setting = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    use_cpu = setting in ("y", "yes", "t", "true", "on", "1")  # as Accelerate reads it
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def encoders_on(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the codec's networks are on a device; afterwards back on their own."""
    with on_device(networks(teacher), device):
        yield


@contextmanager
def decoder_on(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the codec's VAE is on a device, if it has one; afterwards back on its own.

    Text encoders, which are larger, stay where they are.
    """
    vae = teacher.codec.vae
    with on_device([] if vae is None else [vae], device):
        yield


@contextmanager
def on_device(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, the networks are on a device; afterwards back on their own."""
    homes = [device_of(m) for m in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def device_of(module: nn.Module) -> torch.device:
    """The device of a network's weights."""
    return next(iter((*module.parameters(), *module.buffers())), torch.empty(0)).device
