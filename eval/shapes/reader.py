"""Reading a scene back off its pixels, by exact code: no weights, nothing learned.

Whatever differs from the background falls into connected components. Each component's colour is the
nearest of the palette, its shape the one whose drawing at the component's own area and centroid
leaves the least squared difference. Objects that disagree, or resemble nothing, read as None.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from eval.errors import MetricError
from eval.shapes.scenes import (
    ANCHORS,
    AREA,
    BACKGROUND,
    COLOURS,
    COUNTS,
    PALETTE,
    POSITIONS,
    SHAPES,
    SINKS,
    SIZE,
    Scene,
    coverage,
    parse,
)

# A pixel is an object's at this distance in RGB from the background, or, so that the soft rims of
# bright neighbours do not join them, at this share of the picture's greatest distance.
SEEN, SEEN_SHARE = 70.0, 0.45
SPECK = 6  # components of fewer pixels are not objects; the smallest triangle drawn has 23
OFF_COLOUR = 75.0  # further than this from every colour of the palette is none of them
EXTENTS = (2.5, 7.0)  # half extents of what counts as an object; those drawn are 3.4 to 5.5
MISFIT = 0.22  # squared difference to the best shape, over the area; beyond it, it is no shape


def read(images: Tensor | np.ndarray) -> list[Scene | None]:
    """What each picture shows, or None for what no caption describes.

    Args:
        images: uint8 (N, 3, 32, 32).

    Raises:
        MetricError: they have another shape or type.
    """
    pixels = np.asarray(images)
    if pixels.shape[1:] != (3, SIZE, SIZE) or pixels.dtype != np.uint8:
        size = "×".join(map(str, pixels.shape[1:]))
        raise MetricError(f"shapes: images are {pixels.dtype} {size}; it takes uint8 3×32×32")
    found: list[Scene | None] = []
    for i in range(0, len(pixels), 512):  # bounds the memory
        found += _read(pixels[i : i + 512])
    return found


def accuracy(images: Tensor | np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Shares of pictures that show what was asked: in all (`accuracy`), and by each attribute.

    A picture that reads as None has every attribute wrong.

    Raises:
        MetricError: a caption is outside the grammar, or their number is not the images'.
    """
    if len(captions) != len(images) or not len(images):
        raise MetricError(f"shapes: {len(images)} images for {len(captions)} captions")
    wanted, found = [parse(c) for c in captions], read(images)
    shares = {"accuracy": float(np.mean([w == f for w, f in zip(wanted, found)]))}
    for i, name in enumerate(Scene._fields):
        right = [f is not None and w[i] == f[i] for w, f in zip(wanted, found)]
        shares[f"{name}_accuracy"] = float(np.mean(right))
    return shares


def _read(pixels: np.ndarray) -> list[Scene | None]:
    n = len(pixels)
    offset = pixels.transpose(0, 2, 3, 1) - BACKGROUND  # (N, 32, 32, 3)
    strength = np.sqrt((offset**2).sum(-1))
    seen = np.maximum(SEEN, SEEN_SHARE * strength.max((1, 2), keepdims=True))
    label = components(strength > seen)
    names, sizes = np.unique(label[label > 0], return_counts=True)
    names = names[sizes >= SPECK]
    label = np.where(np.isin(label, names), label, 0)
    label = np.where(label > 0, label, _spread(label))  # the soft rim, below the threshold
    owner = (names - 1) // SIZE**2  # which picture
    counts = np.bincount(owner, minlength=n)
    usable = np.isin(counts, COUNTS)  # the rest is not worth the time
    names, owner = names[usable[owner]], owner[usable[owner]]
    if not len(names):
        return [None] * n

    own = label[owner] == names[:, None, None]  # (K, 32, 32)
    core = strength[owner] * own
    core = core >= 0.75 * core.max((1, 2), keepdims=True)
    colour = np.einsum("khw,khwc->kc", core, offset[owner]) / core.sum((1, 2))[:, None]
    far = np.linalg.norm(colour[:, None] + BACKGROUND - PALETTE, axis=-1)
    hue, off_colour = far.argmin(1), far.min(1)

    cover = np.einsum("khwc,kc->khw", offset[owner], colour) / (colour**2).sum(1)[:, None, None]
    cover = (cover * own).clip(0, 1.2)
    area = cover.sum((1, 2))
    grid = np.arange(SIZE) + 0.5
    x = np.einsum("khw,w->k", cover, grid) / area
    y = np.einsum("khw,h->k", cover, grid) / area
    misfit, middle = np.empty((2, len(SHAPES), len(names)))
    for kind in range(len(SHAPES)):
        extent = np.sqrt(area / AREA[kind])
        middle[kind] = y - SINKS[kind] * extent
        drawn = coverage(np.full(len(names), kind), x, middle[kind], extent)
        misfit[kind] = ((drawn - cover) ** 2).sum((1, 2)) / area
    shape = misfit.argmin(0)
    y = middle[shape, np.arange(len(names))]
    extent = np.sqrt(area / AREA[shape])
    good = (misfit.min(0) < MISFIT) & (off_colour < OFF_COLOUR)
    good &= (extent > EXTENTS[0]) & (extent < EXTENTS[1])

    found: list[Scene | None] = []
    starts = np.searchsorted(owner, np.arange(n + 1))
    for i in range(n):
        k = slice(starts[i], starts[i + 1])
        whole = usable[i] and good[k].all()
        if not whole or len({*zip(shape[k], hue[k])}) != 1:
            found.append(None)
            continue
        centre = np.array([x[k].mean(), y[k].mean()])
        place = np.linalg.norm(ANCHORS - centre, axis=1).argmin()
        found.append(
            Scene(SHAPES[shape[k][0]], list(COLOURS)[hue[k][0]], int(counts[i]),
                  list(POSITIONS)[place])
        )  # fmt: skip
    return found


def components(mask: np.ndarray) -> np.ndarray:
    """Names of 4-connected components, (N, H, W): one positive number for each, 0 outside.

    A component is named by its last pixel's place in the array, plus one, so that names rise with
    the picture and (name - 1) // (H W) is the picture's index.
    """
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.where(mask, np.maximum(label, _spread(label)), 0)
        if np.array_equal(grown, label):
            return label
        label = grown


def _spread(label: np.ndarray) -> np.ndarray:
    """The largest of the four neighbours."""
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)))
    across = np.maximum(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    return np.maximum(across, np.maximum(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]))
