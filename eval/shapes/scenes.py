"""Captioned scenes: a finite grammar, and images of its captions drawn by closed forms.

A caption such as "two red circles on the left" fixes four attributes. Size, exact position and
shade vary with the seed. Lengths are in pixels of a 32×32 image, whose pixel i covers [i, i + 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.errors import MetricError

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = (1, 2, 3)
COLOURS = {
    "red": (225, 50, 50),
    "green": (50, 190, 70),
    "blue": (60, 100, 240),
    "yellow": (240, 210, 50),
    "purple": (175, 65, 215),
    "white": (240, 240, 240),
}
# The mean of the objects' centres, (x, y), is within 2 pixels of this, along each axis.
POSITIONS = {
    "left": (8.5, 16.0),
    "right": (23.5, 16.0),
    "top": (16.0, 8.5),
    "bottom": (16.0, 23.5),
    "middle": (16.0, 16.0),
}
BACKGROUND = np.array((24.0, 24.0, 32.0))
PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
ANCHORS = np.array(list(POSITIONS.values()))
SHADE = 8  # the greatest difference to the palette's colour, in each channel
# By count: the ranges of half extents, and of distances between the centres of neighbours.
EXTENT = {1: (4.0, 5.5), 2: (4.0, 5.0), 3: (3.4, 4.0)}
SPACING = {1: (0.0, 0.0), 2: (11.5, 13.5), 3: (10.2, 10.6)}
ARM = 0.36  # half width of a cross's arms, as a share of its half extent
SIDE = 0.9  # half side of a square, as a share of its half extent

_WORDS = {1: "one", 2: "two", 3: "three"}
_PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}


class Scene(NamedTuple):
    """The attributes of a caption, or those that the reader finds."""

    shape: str
    colour: str
    count: int
    position: str

    @property
    def caption(self) -> str:
        """The one sentence for this scene."""
        plural = "" if self.count == 1 else "es" if self.shape.endswith("s") else "s"
        words = (_WORDS[self.count], self.colour, self.shape + plural, _PLACES[self.position])
        return " ".join(words)


@cache
def _scenes() -> dict[str, Scene]:
    scenes = (Scene(s, c, n, p) for s in SHAPES for c in COLOURS for n in COUNTS for p in POSITIONS)
    return {scene.caption: scene for scene in scenes}


def all_captions() -> list[str]:
    """All 360 captions of the grammar, in a fixed order."""
    return list(_scenes())


def captions(n: int, seed: int) -> list[str]:
    """n captions chosen uniformly, with replacement."""
    every = all_captions()
    return [every[i] for i in np.random.default_rng(seed).integers(len(every), size=n)]


def parse(caption: str) -> Scene:
    """The scene of a caption.

    Raises:
        MetricError: it is not a caption of the grammar.
    """
    scene = _scenes().get(caption)
    if scene is None:
        near = get_close_matches(caption, _scenes(), 1, 0.0)[0]
        raise MetricError(f"shapes: {caption!r} is not a caption; did you mean {near!r}?")
    return scene


@cache
def scenes_of(caption: str) -> frozenset[Scene]:
    """All scenes that fit a caption; a word that no caption of the grammar has stands for any.

    Raises:
        MetricError: there is none.
    """
    known = {word for text in _scenes() for word in text.split()}
    words = [word if word in known else None for word in caption.split()]
    fits = frozenset(
        scene
        for text, scene in _scenes().items()
        if len(split := text.split()) == len(words)
        and all(a is None or a == b for a, b in zip(words, split, strict=True))
    )
    if not fits:
        near = get_close_matches(caption, _scenes(), 1, 0.0)[0]
        raise MetricError(f"shapes: {caption!r} is like no caption; one is {near!r}")
    return fits


def draw(captions: Sequence[str], seed: int) -> Tensor:
    """An image of each caption: uint8 (N, 3, 32, 32), deterministic in the arguments.

    Raises:
        MetricError: a caption is not one of the grammar.
    """
    scenes = [parse(c) for c in captions]
    if not scenes:
        return torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8)
    rng = np.random.default_rng(seed)
    n = len(scenes)
    count = np.array([s.count for s in scenes])
    shape = np.array([SHAPES.index(s.shape) for s in scenes])
    colour = PALETTE[[list(COLOURS).index(s.colour) for s in scenes]]
    place = np.array([list(POSITIONS).index(s.position) for s in scenes])
    colour = (colour + rng.uniform(-SHADE, SHADE, (n, 3))).clip(0, 255)

    low, high = np.array([EXTENT[k] for k in COUNTS])[count - 1].T
    extent = rng.uniform(low, high)
    low, high = np.array([SPACING[k] for k in COUNTS])[count - 1].T
    spacing = rng.uniform(low, high)
    # Objects form a column at the sides, a row at top and bottom, and either in the middle.
    upright = np.where(place < 2, True, np.where(place < 4, False, rng.random(n) < 0.5))
    room = np.where(count == 3, 0.9, 2.0)  # three objects fill the image along their line
    along, across = rng.uniform(-1, 1, (2, n)) * np.stack([room, np.full(n, 2.0)])
    middle = ANCHORS[place] + np.where(upright[:, None], np.stack([across, along], 1),
                                       np.stack([along, across], 1))  # fmt: skip
    images = np.broadcast_to(BACKGROUND[:, None, None], (n, 3, SIZE, SIZE)).copy()
    for k in range(max(COUNTS)):
        offset = (k - (count - 1) / 2) * spacing
        wobble = rng.uniform(-1, 1, (2, n)) * np.where(count == 1, 0.0, 0.3)
        x = middle[:, 0] + np.where(upright, 0, offset) + wobble[0]
        y = middle[:, 1] + np.where(upright, offset, 0) + wobble[1]
        cover = coverage(shape, x, y, extent) * (k < count)[:, None, None]
        images += cover[:, None] * (colour - BACKGROUND)[:, :, None, None]
    return torch.from_numpy(images.round().clip(0, 255).astype(np.uint8))


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """The share of each pixel that a shape covers, (K, 32, 32), exact for squares and crosses.

    For circles and the sides of triangles, the share is the distance to the edge.

    Args:
        shape: Indices into SHAPES, (K,).
        x, y: The middle of the bounding box, (K,).
        extent: Half the side of the bounding box, (K,); a square's is divided by SIDE.
    """
    cover = np.empty((len(shape), SIZE, SIZE))
    for kind in range(len(SHAPES)):
        mask = shape == kind
        if mask.any():
            cover[mask] = _COVER[kind](
                x[mask, None, None], y[mask, None, None], extent[mask, None, None]
            )
    return cover


_PIXEL = np.arange(SIZE, dtype=np.float64)
_COLUMN, _ROW = _PIXEL[None, None, :], _PIXEL[None, :, None]


def _overlap(pixel: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The length of each pixel's overlap with [low, high]."""
    return (np.minimum(pixel + 1, high) - np.maximum(pixel, low)).clip(0, 1)


def _circle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    distance = np.hypot(_COLUMN + 0.5 - x, _ROW + 0.5 - y)
    return (r - distance + 0.5).clip(0, 1)


def _square(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    h = SIDE * r
    return _overlap(_COLUMN, x - h, x + h) * _overlap(_ROW, y - h, y + h)


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """A triangle with its apex up, as wide as it is high."""
    beyond = (2 * abs(_COLUMN + 0.5 - x) - (_ROW + 0.5 - y + r)) / np.sqrt(5)
    return (0.5 - beyond).clip(0, 1) * _overlap(_ROW, y - r, y + r)


def _cross(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    w = ARM * r
    wide, high = _overlap(_COLUMN, x - r, x + r), _overlap(_ROW, y - r, y + r)
    slim, low = _overlap(_COLUMN, x - w, x + w), _overlap(_ROW, y - w, y + w)
    return wide * low + slim * high - slim * low


_COVER = (_circle, _square, _triangle, _cross)
# In half extents: the area, and the offset of the centroid below the middle of the box.
AREA = np.array([np.pi, 4 * SIDE**2, 2.0, 8 * ARM - 4 * ARM**2])
SINKS = np.array([0.0, 0.0, 1 / 3, 0.0])
