"""What the objectives on pairs share: the distance of x̂ to a pair's sample.

LPIPS compares pixels, so it is for teachers of RGB images, at any size: smaller ones than 224 are
resized to it, as in openai/consistency_models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from distill.objectives.losses import huber, mean_square
from eval.metrics.perceptual import lpips_network
from teachers.errors import UserError

Distance = Literal["square", "huber", "absolute", "lpips"]
SIDE = 224  # pixels to which LPIPS sees smaller images resized


def distances(x: Tensor, target: Tensor, kind: Distance, huber_c: float | None = None) -> Tensor:
    """The distance of x to its target, both (B, ...): (B,).

    square: |Δ|² averaged over dimensions. absolute: |Δ| averaged over them. huber: √(|Δ|² + c²) - c
    of the whole sample, divided by the number of dimensions d; c is 0.00054 √d unless it is given.
    lpips: its value.
    """
    if kind == "square":
        return mean_square(x, target)
    if kind == "absolute":
        return (x - target).abs().flatten(1).mean(1)
    if kind == "lpips":
        return lpips(x, target)
    d = x[0].numel()
    return huber(x, target, 0.00054 * d**0.5 if huber_c is None else huber_c) / d


def lpips(x: Tensor, target: Tensor) -> Tensor:
    """LPIPS (arXiv:1801.03924, VGG) between images (B, 3, H, W) in [-1, 1]; (B,).

    Raises:
        UserError: they are not RGB images.
    """
    check_lpips(x.shape)
    if min(x.shape[2:]) < SIDE:
        x, target = (F.interpolate(v, (SIDE, SIDE), mode="bilinear") for v in (x, target))
    return _network(str(x.device))(x, target).flatten()


def check_images(shape: tuple[int, ...]) -> None:
    """Refuse data of a shape (B, ...) that have no rows and columns.

    Raises:
        UserError: they have none.
    """
    if len(shape) != 4:
        raise UserError(
            "objective.high_pass: it is for images, and these data have none; set it to 0"
        )


def check_lpips(shape: tuple[int, ...]) -> None:
    """Refuse data of a shape (B, ...) that LPIPS does not compare.

    Raises:
        UserError: they are not RGB images.
    """
    if len(shape) != 4 or shape[1] != 3:
        shown = "×".join(map(str, shape[1:]))
        raise UserError(
            f"objective.distance: lpips compares RGB images, and this teacher's data are {shown}; "
            "set it to huber"
        )


@cache
def _network(place: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lpips_network().to(place)
