"""Samples: what a generator made, as every metric takes it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eval.errors import MetricError


class Samples(NamedTuple):
    """Pictures, what was asked for, and how long it took.

    images: uint8, (N, C, H, W), 0 to 255.
    prompts: N strings (class labels are written as decimal strings).
    seconds: wall-clock time of generation alone.
    costs: of one picture, by name, such as network evaluations; averaged as metrics are.
    """

    images: Tensor
    prompts: list[str]
    seconds: float = 0.0
    costs: Mapping[str, float] = MappingProxyType({})


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as bytes, rounded to the nearest (EDM's convention, arXiv:2206.00364).

    Args:
        images: (N, C, H, W), any float type; values outside [-1, 1] are clipped.

    Raises:
        MetricError: some pixel is not a finite number.
    """
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images)).flatten(1).any(1).sum().item()
        raise MetricError(f"samples: {bad} of {len(images)} images hold NaN or infinity")
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def pictures(images: Tensor) -> list[Image.Image]:
    """Pillow's images of uint8 (N, 3, H, W)."""
    return [Image.fromarray(v) for v in images.permute(0, 2, 3, 1).cpu().numpy()]


def by_prompt(prompts: list[str]) -> dict[str, list[int]]:
    """The places of each prompt among `prompts`."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    return places
