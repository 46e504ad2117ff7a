"""An exact reader of scenes: it finds the caption from the pixels, without learned weights.

Pixels that differ from the background form connected components. A component's colour is the
nearest of the palette. Its shape is the one whose drawing, at the component's area and centroid,
has the least squared difference. Objects that disagree, or match nothing, give None.
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
    scenes_of,
)

# A pixel belongs to an object from this distance in RGB to the background on. The second threshold
# is a share of the image's greatest distance, so that soft rims do not connect bright neighbours.
THRESHOLD, THRESHOLD_SHARE = 70.0, 0.45
SPECK = 6  # smaller components, in pixels, are no objects; the smallest triangle drawn has 23
OFF_COLOUR = 75.0  # the greatest distance to a colour of the palette
EXTENTS = (2.5, 7.0)  # the range of objects' half extents; those drawn are 3.4 to 5.5
MISFIT = 0.22  # the greatest squared difference to the best shape, over the area


def read(images: Tensor | np.ndarray) -> list[Scene | None]:
    """The scene that each image shows, or None if no caption describes it.

    Args:
        images: uint8 (N, 3, 32, 32).

    Raises:
        MetricError: the images have another shape or type.
    """
    pixels = np.asarray(images)
    if pixels.shape[1:] != (3, SIZE, SIZE) or pixels.dtype != np.uint8:
        size = "×".join(map(str, pixels.shape[1:]))
        raise MetricError(f"shapes: images are {pixels.dtype} {size}; it takes uint8 3×32×32")
    scenes: list[Scene | None] = []
    for i in range(0, len(pixels), 512):  # bounds the memory
        scenes += _read(pixels[i : i + 512])
    return scenes


def accuracy(images: Tensor | np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Shares of images that show their caption, entirely (`accuracy`) and by each attribute.

    An image that reads as None has every attribute wrong.

    Raises:
        MetricError: a caption is outside the grammar, or the number of captions is wrong.
    """
    if len(captions) != len(images) or not len(images):
        raise MetricError(
            f"shapes: {len(images)} images for {len(captions)} captions; give one for each"
        )
    expected, scenes = [parse(c) for c in captions], read(images)
    pairs = list(zip(expected, scenes))
    shares = {"accuracy": float(np.mean([a == b for a, b in pairs]))}
    for i, name in enumerate(Scene._fields):
        correct = [b is not None and a[i] == b[i] for a, b in pairs]
        shares[f"{name}_accuracy"] = float(np.mean(correct))
    return shares


def known_words_accuracy(images: Tensor | np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """The share of images that show what the known words of their caption say.

    A word that the grammar lacks, such as a new colour's, stands for any. Of captions of the
    grammar it is `accuracy`.

    Raises:
        MetricError: the known words of a caption are in no caption of the grammar.
    """
    found = [scene in scenes_of(c) for scene, c in zip(read(images), captions, strict=True)]
    return {"accuracy": float(np.mean(found))}


def _read(pixels: np.ndarray) -> list[Scene | None]:
    n = len(pixels)
    offset = pixels.transpose(0, 2, 3, 1) - BACKGROUND  # (N, 32, 32, 3)
    strength = np.sqrt((offset**2).sum(-1))
    threshold = np.maximum(THRESHOLD, THRESHOLD_SHARE * strength.max((1, 2), keepdims=True))
    label = components(strength > threshold)
    names, sizes = np.unique(label[label > 0], return_counts=True)
    names = names[sizes >= SPECK]
    label = np.where(np.isin(label, names), label, 0)
    label = np.where(label > 0, label, _spread(label))  # the soft rim, below the threshold
    owner = (names - 1) // SIZE**2  # index of the image
    counts = np.bincount(owner, minlength=n)
    usable = np.isin(counts, COUNTS)  # other images read as None
    names, owner = names[usable[owner]], owner[usable[owner]]
    if not len(names):
        return [None] * n

    mask = label[owner] == names[:, None, None]  # (K, 32, 32)
    core = strength[owner] * mask
    core = core >= 0.75 * core.max((1, 2), keepdims=True)
    colour = np.einsum("khw,khwc->kc", core, offset[owner]) / core.sum((1, 2))[:, None]
    distance = np.linalg.norm(colour[:, None] + BACKGROUND - PALETTE, axis=-1)
    hue, off_colour = distance.argmin(1), distance.min(1)

    cover = np.einsum("khwc,kc->khw", offset[owner], colour) / (colour**2).sum(1)[:, None, None]
    cover = (cover * mask).clip(0, 1.2)
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

    scenes: list[Scene | None] = []
    starts = np.searchsorted(owner, np.arange(n + 1))
    for i in range(n):
        k = slice(starts[i], starts[i + 1])
        valid = usable[i] and good[k].all()
        if not valid or len({*zip(shape[k], hue[k])}) != 1:
            scenes.append(None)
            continue
        centre = np.array([x[k].mean(), y[k].mean()])
        position = np.linalg.norm(ANCHORS - centre, axis=1).argmin()
        scenes.append(
            Scene(SHAPES[shape[k][0]], list(COLOURS)[hue[k][0]], int(counts[i]),
                  list(POSITIONS)[position])
        )  # fmt: skip
    return scenes


def components(mask: np.ndarray) -> np.ndarray:
    """Labels of 4-connected components, (N, H, W): a positive number for each, 0 outside.

    A label is the index of the component's last pixel in the array, plus one. Labels therefore rise
    with the image, and (label - 1) // (H W) is the image's index.
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
