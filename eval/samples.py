"""Samples of a generator, as every metric takes them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eval.errors import MetricError


class Samples(NamedTuple):
    """Images, their prompts, and their cost.

    images: uint8, (N, C, H, W), 0 to 255.
    prompts: N texts, or class labels as decimal numbers.
    seconds: wall-clock time of the generation.
    costs: costs of one image by key, such as network evaluations; averaged like metrics.
    """

    images: Tensor
    prompts: list[str]
    seconds: float = 0.0
    costs: Mapping[str, float] = MappingProxyType({})


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, rounded to nearest as in EDM (arXiv:2206.00364).

    Args:
        images: (N, C, H, W), any float type; values outside [-1, 1] are clamped.

    Raises:
        MetricError: a pixel is not finite.
    """
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images)).flatten(1).any(1).sum().item()
        raise MetricError(
            f"samples: {bad} of {len(images)} images hold NaN or infinity; check the sampler"
        )
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def pillow_images(images: Tensor) -> list[Image.Image]:
    """Uint8 images (N, 3, H, W) as Pillow images."""
    return [Image.fromarray(v) for v in images.permute(0, 2, 3, 1).cpu().numpy()]


def by_prompt(prompts: list[str]) -> dict[str, list[int]]:
    """The indices of each prompt in `prompts`."""
    indices: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        indices.setdefault(prompt, []).append(i)
    return indices
