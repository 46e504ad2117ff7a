"""Figures of a user's LoRA in a student and in its teacher: style, colours, overlap of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from teachers.adapters.files import Pair

PIXELS = "pixels"  # the features of images for which no network is at hand
SIDE = 8  # of the image that they are averaged to
Features = Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> (N, D)


def pooled_pixels(images: Tensor) -> Tensor:
    """Pixels of uint8 images (N, C, H, W) in [0, 1], averaged to 8×8: (N, 64 C)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, SIDE).flatten(1)


# ---- style


def shift(plain: Tensor, styled: Tensor) -> Tensor:
    """μ(·+L) − μ(·): the change of the mean of features (N, D), in float64."""
    return styled.double().mean(0) - plain.double().mean(0)


def shift_ratio(student: Tensor, teacher: Tensor) -> float | None:
    """‖student's shift‖ / ‖teacher's shift‖; None if the teacher's is 0."""
    length = teacher.norm().item()
    return student.norm().item() / length if length else None


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Of the angle between two shifts; None if one of them is 0."""
    lengths = a.norm().item() * b.norm().item()
    return max(-1.0, min(1.0, (a @ b).item() / lengths)) if lengths else None


def halves_cosine(plain: Tensor, styled: Tensor) -> float | None:
    """The cosine of one model's own shifts in one half of the pictures and in the other.

    A student's cosine with its teacher is about this if both have the same style.
    """
    a, b = (shift(plain[i::2], styled[i::2]) for i in (0, 1))
    return cosine(a, b) if len(plain) > 1 else None


# ---- colours


def saturation(images: Tensor) -> float:
    """The mean over pixels of (max − min) / max of the channels of uint8 images (N, C, H, W)."""
    pixels = images.double()
    most = pixels.amax(1)
    return ((most - pixels.amin(1)) / most.clamp(min=1)).mean().item()


def clipped_share(images: Tensor) -> float:
    """The share of pixels with a channel at 0 or 255, the ends of uint8."""
    return ((images == 0) | (images == 255)).any(1).double().mean().item()


# ---- overlap of adapters


def overlap(style: Iterable[Pair], turbo: Iterable[Pair]) -> dict[str, Any]:
    """How much of what the student's adapter reads the user's LoRA reads too, by layer.

    For the factors A (rank, in) of a layer: ‖P A_turboᵀ‖ / ‖A_turbo‖, where P projects onto the
    rows of A_style. By chance it is √(rank of A_style / in). Rows of A that B scarcely uses count
    as much as others there, so `change` is the same share of B A. No images are needed.

    Returns:
        The means over the layers that both change: of A, by chance, and of B A; the largest of A
        and its layer; and the number of such layers. Without a layer, the number alone.
    """
    theirs = {(p.part, p.module): p for p in turbo}
    rows = []
    for pair in style:
        other = theirs.get((pair.part, pair.module))
        if other is not None and other.down.any() and other.up.any() and pair.down.any():
            basis = row_space(pair.down)
            shares = [inside(v, basis) for v in (other.down, other.delta())]
            rows.append((*shares, math.sqrt(basis.shape[1] / basis.shape[0]), pair.module))
    if not rows:
        return {"layers": 0}
    most, _, _, layer = max(rows)
    return {
        "layers": len(rows),
        "mean": mean(r[0] for r in rows),
        "change": mean(r[1] for r in rows),
        "by_chance": mean(r[2] for r in rows),
        "largest": most,
        "layer": layer,
    }


def inside(rows: Tensor, basis: Tensor) -> float:
    """The share of the norm of rows (N, in, …) that lies in the span of a basis (in, rank)."""
    flat = rows.flatten(1).double()
    return (flat @ basis).norm().item() / flat.norm().item()


def row_space(down: Tensor) -> Tensor:
    """An orthonormal basis (in, rank) of the rows of a factor (rank, in, …)."""
    _, values, basis = torch.linalg.svd(down.flatten(1).double(), full_matrices=False)
    return basis[values > 1e-6 * values[0]].T


# ---- several LoRA files


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over rows of LoRA files, and the worst value with its row.

    Rows of strength 0 are left out. The worst shift ratio is that farthest from 1, as a factor;
    of saturation and clipped pixels it is the student's largest change against the teacher, and of
    the prompt score its largest loss.
    """
    used = [r for r in rows if r["strength"]]
    figures: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], Any]] = {
        "shift_ratio": (lambda r: r["shift_ratio"], lambda v: -abs(math.log(max(v, 1e-9)))),
        "shift_cosine": (lambda r: r["shift_cosine"], lambda v: v),
        "prompt_score": (gap("prompt_score"), lambda v: v),
        "saturation": (gap("saturation"), lambda v: -abs(v)),
        "clipped": (gap("clipped"), lambda v: -v),
    }
    result: dict[str, Any] = {"mean": {}, "worst": {}}
    for name, (value, goodness) in figures.items():
        known = [(v, r) for r in used if (v := value(r)) is not None]
        if known:
            result["mean"][name] = mean(v for v, _ in known)
            worst, row = min(known, key=lambda item: goodness(item[0]))
            place = {"lora": row["lora"], "strength": row["strength"]}
            result["worst"][name] = {"value": worst, **place}
    return result


def gap(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    """The function that gives a row's student minus its teacher, of one figure."""

    def difference(row: Mapping[str, Any]) -> float | None:
        if key not in row["student"]:
            return None
        return row["student"][key] - row["teacher"][key]

    return difference
