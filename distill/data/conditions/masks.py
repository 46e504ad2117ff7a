"""Masks of inpainting, drawn at random from a seed of their own: everything, rectangles, strokes.

The kinds are those of large-mask training (arXiv:2109.07161) in a simpler form, with the mask of
everything that inpainting networks are trained on as well, so that they draw from text alone.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distill.seeds import seed_of

VERSION = 1  # of the masks that a seed gives; caches depend on it
EVERYTHING = 0.2  # share of masks that cover the whole picture
RECTANGLES = 0.4  # and of those that are rectangles; the others are strokes


class Draws:
    """Uniform random numbers from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.rng).item()

    def whole(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.rng))


def random_mask(number: int, height: int, width: int, partial: bool = False) -> Tensor:
    """The mask of picture `number` (1, height, width): 1 where it is painted anew, 0 elsewhere.

    A fifth of the masks is everything. Two fifths are 1 to 3 rectangles, whose sides are 1/8 to 3/4
    of the picture's. Two fifths are 1 to 4 strokes of 3 to 10 points, 1/20 to 1/6 of the shorter
    side wide.

    Args:
        partial: Draw rectangles or strokes where the mask would be everything.
    """
    draws = Draws(seed_of("mask", number))
    kind = draws.real(0, 1)
    if partial and kind < EVERYTHING:
        kind = EVERYTHING + (1 - EVERYTHING) * kind / EVERYTHING  # uniform among the other kinds
    if kind < EVERYTHING:
        return torch.ones(1, height, width)
    image = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(image)
    if kind < EVERYTHING + RECTANGLES:
        for _ in range(draws.whole(1, 3)):
            h, w = (max(1, round(n * draws.real(1 / 8, 3 / 4))) for n in (height, width))
            top, left = draws.whole(0, height - h), draws.whole(0, width - w)
            pen.rectangle((left, top, left + w - 1, top + h - 1), fill=255)
    else:
        for _ in range(draws.whole(1, 4)):
            _stroke(pen, draws, height, width)
    return torch.from_numpy(np.array(image) > 0).float()[None]


def _stroke(pen: ImageDraw.ImageDraw, draws: Draws, height: int, width: int) -> None:
    """One stroke with round corners, from point to point."""
    points = [
        (draws.real(0, width - 1), draws.real(0, height - 1)) for _ in range(draws.whole(3, 10))
    ]
    radius = max(0.5, draws.real(1 / 40, 1 / 12) * min(height, width))
    pen.line(points, fill=255, width=max(1, round(2 * radius)))
    for x, y in points:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
