"""Listed items through a teacher's codec: a few at a time, always in the same groups.

What an item is encoded beside can change its last digits. The groups are therefore a function of
the list alone, so that data held in memory and data from a cache are the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.data import Buckets, Source
from distill.fingerprint import networks
from distill.images import READERS, pixels, signed
from distill.listing import Bad, Item, Listing, report
from distill.seeds import seed_of
from distill.terminal import notice
from teachers.cuts import Cuts
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.pipeline import Prompted
from teachers.teacher import Teacher

TOGETHER = 16  # items encoded at once
COND = "cond."  # begins the names of conditions among encoded tensors; data are "x"

Encoded = dict[str, Tensor]


class Work:
    """Items, and how they become tensors.

    Args:
        listing: The items, each with its bucket.
        sizes: Height and width in pixels of each bucket.
        with_data: Whether images are encoded, or their prompts alone.

    Raises:
        UserError: a picture of the first size is no datum of the teacher's.
    """

    def __init__(
        self, teacher: Teacher, listing: Listing, sizes: list[tuple[int, int]], with_data: bool
    ) -> None:
        self.teacher, self.listing, self.sizes = teacher, listing, sizes
        self.with_data = with_data
        self.device = device()
        self.cuts = Cuts()  # of the prompts encoded here, those that are not read to their end
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
        found = self._through(images, [self.groups[bucket][0].prompt])
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

    def encode(self, items: list[Item]) -> tuple[Encoded, list[Bad]]:
        """Tensors (N, ...) on the CPU of those of at most TOGETHER items that are good."""
        bad: list[Bad] = []
        images: list[Tensor] = []
        good = items
        if self.with_data:
            good = []
            with ThreadPoolExecutor(READERS) as pool:
                for item, image in zip(items, pool.map(self._pixels, items), strict=True):
                    if isinstance(image, Bad):
                        bad.append(image)
                    else:
                        good.append(item)
                        images.append(image)
        if not good:
            return {}, bad
        x = signed(images) if self.with_data else None
        prompts = [i.prompt for i in good]
        with counting(self.teacher) as cuts:
            found = self._through(x, prompts)
        self.cuts.add(cuts)
        for name, shape in self.shapes(good[0].bucket).items():
            if found[name].shape[1:] != shape:
                raise UserError(
                    f"teacher {self.teacher.source!r}: its codec made {name} of shape "
                    f"{tuple(found[name].shape[1:])} after {shape}; pad it to one length"
                )
        return found, bad

    def tell(self) -> None:
        """Say how many prompts were cut, if any."""
        tell(self.cuts, self.listing.where)

    @torch.no_grad()
    def _through(self, images: Tensor | None, prompts: list) -> Encoded:
        codec = self.teacher.codec
        found: Encoded = {}
        if images is not None:
            found["x"] = codec.encode(images.to(self.device))
        cond = codec.condition(prompts)
        found |= {f"{COND}{k}": v for k, v in (cond or {}).items()}
        return {k: v.detach().cpu().contiguous() for k, v in found.items()}

    def _pixels(self, item: Item) -> Tensor | Bad:
        return pixels(item, self.channels, *self.sizes[item.bucket])


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
    """
    listing, bad = work.listing, list(work.listing.bad)
    total = listing.total
    sources: list[Source] = []
    with encoders_on(work.teacher, work.device):
        for bucket, items in work.groups.items():
            full = {
                k: v.new_empty(len(items), *v.shape[1:]) for k, v in work.samples[bucket].items()
            }
            rows = 0
            for some in parts(items):
                found, faults = work.encode(some)
                n = len(some) - len(faults)
                for name, value in found.items():
                    full[name][rows : rows + n] = value
                rows += n
                bad += faults
                listing.check(bad, total, share)
            x, cond = split({k: v[:rows] for k, v in full.items()})
            shape = work.shapes(bucket).get("x", work.teacher.shape)
            sources.append(Source(shape, x, cond, bucket_seed(seed, bucket), rows))
    work.tell()
    return joined(sources, seed, report(total, bad))


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
    """Where encoders do their work: this process's GPU, where there is one to use."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def encoders_on(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the codec's networks are on a device; after it, back where they were."""
    with moved(networks(teacher), device):
        yield


@contextmanager
def decoder_on(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the network that makes pictures of latents is on a device, where there is one;
    after it, back where it was. Text encoders, which are larger, stay."""
    vae = getattr(teacher.codec, "vae", None)
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
