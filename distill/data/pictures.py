"""Pixels of listed images: decoded as a viewer shows them, resized, cropped, put into buckets."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config.schema import Bucketing
from distill.data.conditions.masks import random_mask
from distill.data.listing import BadItem, Item, Listing
from eval.images import is_first_of_many, open_image, size_of, to_srgb
from teachers.conditions import Pictured
from teachers.errors import UserError

MOST_SIDES = 10_000  # different sides of buckets
READERS = 8  # threads that read and decode
CORRUPT = "corrupt image"


def sizes_of(buckets: Bucketing | None, height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths in pixels to crop images to: one size, or all buckets of about its area.

    For each multiple, a bucket has it as one side, and as the other side the multiple that brings
    the area nearest to height × width. Each bucket is there in both orientations, if its longer
    side is at most `ratio` times its shorter side.

    Raises:
        UserError: there are too many sizes, or none.
    """
    if buckets is None:
        return [(height, width)]
    m, area = buckets.multiple, height * width
    if m > min(height, width):
        raise UserError(
            f"data.buckets.multiple: {m} is more than the image size, {height}; lower it"
        )
    longest = math.isqrt(round(area * buckets.ratio))
    if longest // m > MOST_SIDES:
        raise UserError(
            f"data.buckets.multiple: {m} makes more than {MOST_SIDES:,} sizes of sides up to "
            f"{longest:,}; raise it"
        )
    shapes: set[tuple[int, int]] = set()
    for side in range(m, longest + 1, m):
        other = max(m, round(area / side / m) * m)
        if max(side, other) <= buckets.ratio * min(side, other):
            shapes |= {(side, other), (other, side)}
    sizes = sorted(shapes)
    if not sizes:
        raise UserError(
            f"data.buckets: no size whose sides are multiples of {m} has a ratio of at most "
            f"{buckets.ratio:g}; lower multiple, or raise ratio"
        )
    return sizes


def into_buckets(listing: Listing, sizes: list[tuple[int, int]]) -> None:
    """Assign each item to the bucket whose aspect ratio is nearest to that of its image."""
    if len(sizes) == 1:
        return
    logs = [math.log(h / w) for h, w in sizes]
    items, listing.items = listing.items, []
    with ThreadPoolExecutor(READERS) as pool:
        for item, aspect in zip(items, pool.map(aspect_of, items), strict=True):
            if isinstance(aspect, BadItem):
                listing.bad.append(aspect)
                continue
            gaps = [abs(log - math.log(aspect)) for log in logs]
            listing.items.append(item._replace(bucket=gaps.index(min(gaps))))


def aspect_of(item: Item) -> float | BadItem:
    """An image's height divided by its width, from its header."""
    try:
        shown = item._replace(image=item.picture or item.image)
        width, height = size_of(open_image(_stream(shown)))
        return height / width
    except Exception as error:  # Pillow raises many types for bad files
        return _corrupt(item.name, error)


class Picture(NamedTuple):
    """A decoded image.

    pixels: (C, H, W) in uint8.
    first: Whether it is the first of several frames; the others are left out.
    """

    pixels: Tensor
    first: bool


def picture(item: Item, channels: int, height: int, width: int) -> Picture | BadItem:
    """An image as a viewer shows it, resized until it covers height × width, its centre cropped."""
    from torchvision.transforms import functional as tf

    try:
        file = open_image(_stream(item))
        image, first = to_srgb(file), is_first_of_many(file)
    except Exception as error:  # as above
        return _corrupt(item.name, error)
    if channels == 1:
        image = image.convert("L")
    scale = max(height / image.height, width / image.width)
    size = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
    image = tf.center_crop(tf.resize(image, size, antialias=True), [height, width])  # pyright: ignore
    return Picture(tf.pil_to_tensor(image), first)  # pyright: ignore


def pictured(
    item: Item, height: int, width: int, image: Picture | None = None, partial: bool = False
) -> tuple[Picture, Pictured] | BadItem:
    """The picture of an item's prompt, and the prompt with it and with its mask.

    Args:
        image: The picture, where it was read already.
        partial: As `random_mask` takes it, for a mask that is drawn.
    """
    given = _decoded(item, item.picture, 3, height, width) if image is None else image
    if isinstance(given, BadItem):
        return given
    mask = None
    if isinstance(item.mask, int):
        mask = random_mask(item.mask, height, width, partial)
    elif item.mask is not None:
        drawn = _decoded(item, item.mask, 1, height, width)
        if isinstance(drawn, BadItem):
            return drawn._replace(reason=f"its mask is {drawn.reason}")
        mask = (drawn.pixels >= 128).float()
    return given, Pictured(str(item.prompt), signed([given.pixels])[0], mask)


def _decoded(
    item: Item, read: Callable[[], bytes] | None, channels: int, height: int, width: int
) -> Picture | BadItem:
    """A file that comes with an item, as its image is read."""
    return picture(item._replace(image=read), channels, height, width)


def _stream(item: Item) -> io.BytesIO:
    assert item.image is not None, "prompts have no pixels"
    return io.BytesIO(item.image())


def _corrupt(name: str, error: Exception) -> BadItem:
    reason = "its bytes have no known format" if "identify image" in str(error) else str(error)
    return BadItem(name, CORRUPT, f"not a readable image ({reason or type(error).__name__})")


def signed(images: list[Tensor]) -> Tensor:
    """uint8 images (C, H, W) as one tensor (N, C, H, W) in [-1, 1]."""
    return torch.stack(images).float() / 127.5 - 1
