"""Listed items through a teacher's codec: a few at a time, always in the same groups.

What an item is encoded beside can change its last digits. The groups are therefore a function of
the list alone, so that data held in memory and data from a cache are the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.console import notice
from distill.data.fingerprint import networks
from distill.data.listing import Bad, Item, Listing
from distill.data.pictures import READERS, Picture, picture, signed
from distill.data.stream import Buckets, Source
from distill.seeds import seed_of
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.prompt_limits import Cuts
from teachers.teacher import Teacher

TOGETHER = 16  # items encoded at once
COND = "cond."  # begins the names of conditions among encoded tensors; data are "x"

Encoded = dict[str, Tensor]


class NotFinite(UserError):
    """A network of the codec made NaN or infinity."""


class Encoding(NamedTuple):
    """What some items became.

    tensors: (N, ...) on the CPU, of the N that are good.
    bad: The others.
    firsts: Names of images of which the first of several frames was read.
    cuts: Of the good ones' prompts, those that were not read to their end.
    """

    tensors: Encoded
    bad: list[Bad]
    firsts: list[str]
    cuts: Cuts


class Work:
    """Items, and how they become tensors.

    Args:
        listing: The items, each with its bucket.
        sizes: Height and width in pixels of each bucket.
        with_data: Whether images are encoded, or their prompts alone.

    Raises:
        UserError: a picture of the first size is no datum of the teacher's.
        NotFinite: nor is it one of finite numbers.
    """

    def __init__(
        self, teacher: Teacher, listing: Listing, sizes: list[tuple[int, int]], with_data: bool
    ) -> None:
        self.teacher, self.listing, self.sizes = teacher, listing, sizes
        self.with_data = with_data
        self.device = device()
        self.channels = picture_shape(teacher)[0] if with_data else 0
        used = sorted({i.bucket for i in listing.items})
        self.groups = {b: [i for i in listing.items if i.bucket == b] for b in used}
        with encoders_on(teacher, self.device):
            self.samples = {b: self._sample(b) for b in used}
        self.bytes = sum(len(self.groups[b]) * self._size(b) for b in used)

    def _sample(self, bucket: int) -> Encoded:
        """What one item of a bucket becomes, for its shapes: its prompt, and an empty picture."""
        images = None
        if self.with_data:
            images = torch.zeros(1, self.channels, *self.sizes[bucket])
        first = self.groups[bucket][0]
        found = self._through(images, [first.prompt])
        check_finite(found, [f"a grey picture, and the prompt of {first.name}"], self.teacher,
                     self.listing.where)  # fmt: skip
        if self.with_data:
            got, want = found["x"].shape[1:], self.teacher.shape
            fits = got == want if len(self.sizes) == 1 else (got[0], len(got)) == (want[0], 3)
            if not fits:
                shown = ["×".join(map(str, s)) for s in (got, want)]
                raise UserError(
                    f"{self.listing.where} is {shown[0]}; the teacher takes {shown[1]}; "
                    "leave data.size to it"
                )
        return found

    def _size(self, bucket: int) -> int:
        return sum(v[0].numel() * v.element_size() for v in self.samples[bucket].values())

    def shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        """Of each tensor, without the batch."""
        return {k: tuple(v.shape[1:]) for k, v in self.samples[bucket].items()}

    def encode(self, items: list[Item]) -> Encoding:
        """What at most TOGETHER items become.

        Raises:
            NotFinite: a network of the codec made NaN or infinity of one, which is named.
        """
        bad: list[Bad] = []
        images: list[Tensor] = []
        firsts: list[str] = []
        good = items
        if self.with_data:
            good = []
            with ThreadPoolExecutor(READERS) as pool:
                for item, image in zip(items, pool.map(self._picture, items), strict=True):
                    if isinstance(image, Bad):
                        bad.append(image)
                        continue
                    good.append(item)
                    images.append(image.pixels)
                    firsts += [item.name] * image.first
        if not good:
            return Encoding({}, bad, [], Cuts())
        x = signed(images) if self.with_data else None
        prompts = [i.prompt for i in good]
        with counting(self.teacher) as cuts:
            found = self._through(x, prompts)
        check_finite(found, [i.name for i in good], self.teacher, self.listing.where)
        for name, shape in self.shapes(good[0].bucket).items():
            if found[name].shape[1:] != shape:
                raise UserError(
                    f"teacher {self.teacher.source!r}: its codec made {name} of shape "
                    f"{tuple(found[name].shape[1:])} after {shape}; pad it to one length"
                )
        return Encoding(found, bad, firsts, cuts)

    def null(self) -> Encoded:
        """The condition that stands for none, each entry (1, ...); empty where there is none.

        Raises:
            NotFinite: it holds NaN or infinity.
        """
        null = {f"{COND}{k}": v for k, v in (self.teacher.codec.null or {}).items()}
        check_finite(null, ["the empty or negative prompt"], self.teacher, self.listing.where)
        return {k.removeprefix(COND): v.detach().cpu() for k, v in null.items()}

    def tell(self, firsts: list[str], cuts: Cuts) -> None:
        """Say how many images had further frames, and how many prompts were cut by which encoder,
        if any; once of all processes."""
        if firsts and os.environ.get("RANK", "0") == "0":
            notice(
                f"{self.listing.where}: {len(firsts):,} images have several frames or pages, such "
                f"as {firsts[0]}; the first of each is read"
            )
        tell(cuts, self.listing.where)

    @torch.no_grad()
    def _through(self, images: Tensor | None, prompts: list) -> Encoded:
        codec = self.teacher.codec
        found: Encoded = {}
        if images is not None:
            found["x"] = codec.encode(images.to(self.device))
        cond = codec.condition(prompts)
        found |= {f"{COND}{k}": v for k, v in (cond or {}).items()}
        return {k: v.detach().cpu().contiguous() for k, v in found.items()}

    def _picture(self, item: Item) -> Picture | Bad:
        return picture(item, self.channels, *self.sizes[item.bucket])


def check_finite(found: Encoded, names: list[str], teacher: Teacher, where: str) -> None:
    """Refuse what a codec made if it holds NaN or infinity.

    Args:
        found: Data "x" and conditions, each (N, ...).
        names: Of the N items.
        where: Begins the message.

    Raises:
        NotFinite: naming the first such item, the network that made it, and what to do.
    """
    for key, value in found.items():
        if not value.is_floating_point() or torch.isfinite(value).all():
            continue
        rows = (~torch.isfinite(value)).reshape(len(value), -1).any(1)
        row = int(rows.nonzero()[0])
        kind = "NaN" if torch.isnan(value[row]).any() else "infinity"
        vae = teacher.codec.vae
        if key == "x":
            call, parts = "codec.encode", [] if vae is None else [vae]
        else:
            call = f"codec.condition, {key.removeprefix(COND)}"
            parts = [m for m in networks(teacher) if m is not vae]
        raise NotFinite(f"{where}: {names[row]}: {_maker(call, parts, kind, teacher)}")


def _maker(call: str, parts: list[nn.Module], kind: str, teacher: Teacher) -> str:
    """Which network made NaN or infinity in a call, and what to do about it."""
    named = ", ".join(type(m).__name__ for m in parts)
    said = f"teacher {teacher.source!r} made {kind} of it in {call}" + f" ({named})" * bool(named)
    for part in parts:
        if (weight := broken_weight(part)) is not None:
            return (
                f"{said}: {type(part).__name__}'s weight {weight} is not finite; the files are "
                "damaged, fetch them again"
            )
    if any(p.dtype == torch.float16 for m in parts for p in m.parameters()):
        return f"{said}: float16 overflows in it; load it in float32 or bfloat16"
    return f"{said}; load it in float32, or leave this item out"


def broken_weight(module: nn.Module) -> str | None:
    """The name of the first of a network's weights that holds NaN or infinity."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            return name
    return None


@contextmanager
def counting(teacher: Teacher) -> Iterator[Cuts]:
    """Within it, the prompts that the teacher's codec cuts are counted, where it can be told."""
    if not isinstance(teacher.codec, Prompted) or teacher.codec.classes:
        yield Cuts()
        return
    with teacher.codec.counting() as cuts:
        yield cuts


def tell(cuts: Cuts, where: str) -> None:
    """Say how many prompts were cut and by which encoder, if any; once of all processes."""
    if os.environ.get("RANK", "0") == "0":
        for line in cuts.lines(where):
            notice(line)


def split(found: Encoded) -> tuple[Tensor | None, Cond]:
    """Data and condition of encoded tensors."""
    cond = {k.removeprefix(COND): v for k, v in found.items() if k != "x"}
    return found.get("x"), cond or None


def parts(items: list[Item], size: int = TOGETHER) -> Iterator[list[Item]]:
    """The items, `size` at a time."""
    for i in range(0, len(items), size):
        yield items[i : i + size]


def held(work: Work, seed: int, share: float) -> Source:
    """The work done now, its results in memory.

    Raises:
        UserError: more than `share` of the items are bad.
        NotFinite: as `Work.encode`.
    """
    listing, bad = work.listing, list(work.listing.bad)
    total, firsts, cuts = listing.total, [], Cuts()
    sources: list[Source] = []
    with encoders_on(work.teacher, work.device):
        work.null()
        for bucket, items in work.groups.items():
            full = {
                k: v.new_empty(len(items), *v.shape[1:]) for k, v in work.samples[bucket].items()
            }
            rows = 0
            for some in parts(items):
                made = work.encode(some)
                n = len(some) - len(made.bad)
                for name, value in made.tensors.items():
                    full[name][rows : rows + n] = value
                rows += n
                bad += made.bad
                firsts += made.firsts
                cuts.add(made.cuts)
                listing.check(bad, total, share)
            x, cond = split({k: v[:rows] for k, v in full.items()})
            shape = work.shapes(bucket).get("x", work.teacher.shape)
            sources.append(Source(shape, x, cond, bucket_seed(seed, bucket), rows))
    work.tell(firsts, cuts)
    return joined(sources, seed, listing.report(total, bad, firsts))


def bucket_seed(seed: int, bucket: int) -> int:
    """Of a bucket's order and noise: the run's own for the first."""
    return seed_of(seed, "bucket", bucket) if bucket else seed


def joined(sources: list[Source], seed: int, content: dict) -> Source:
    """One source of all buckets that hold something, with the report of how they were read."""
    sources = [s for s in sources if s.size]
    if not sources:
        raise UserError("data: not one item is good; see the first by data.skip_share=0")
    source = sources[0] if len(sources) == 1 else Buckets(sources, seed)
    source.report = content
    return source


def picture_shape(teacher: Teacher) -> tuple[int, ...]:
    """Channels, height and width of the teacher's pictures, as its codec decodes them; for videos
    (C, F, H, W)."""
    if isinstance(teacher.codec, Prompted):  # which knows, and may be large
        return (3, *teacher.codec.size)
    with torch.no_grad():
        return tuple(teacher.codec.decode(torch.zeros(1, *teacher.shape)).shape[1:])


def device() -> torch.device:
    """Where networks do their work outside training: where Accelerate puts those that train.

    ACCELERATE_TORCH_DEVICE names it; ACCELERATE_USE_CPU (true, yes, on or 1) spares a GPU.
    """
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(name)
    said = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    spared = said in ("y", "yes", "t", "true", "on", "1")  # as Accelerate reads it
    if spared or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def encoders_on(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the codec's networks are on a device; after it, back where they were."""
    with moved(networks(teacher), device):
        yield


@contextmanager
def decoder_on(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the network that makes pictures of latents is on a device, where there is one;
    after it, back where it was. Text encoders, which are larger, stay."""
    vae = teacher.codec.vae
    with moved([] if vae is None else [vae], device):
        yield


@contextmanager
def moved(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, the networks are on a device; after it, back where they were."""
    homes = [place(m) for m in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def place(module: nn.Module) -> torch.device:
    """The device of a network's weights."""
    return next(iter((*module.parameters(), *module.buffers())), torch.empty(0)).device
