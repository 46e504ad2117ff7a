"""Teachers: a denoiser with its codec, and the one function that loads any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError, clipped

TERMS = ("README.md", "LICEN[SC]E*")  # files of a model's folder that may state its licence
EMBEDDED = {name: Path(__file__).parent / name for name in ("digits", "shapes")}


class Codec(Protocol):
    """Prompts or labels, and pixels, to and from what the denoiser sees."""

    @property
    def null(self) -> Cond:
        """What stands for no condition, each entry shaped (1, ...); None: there is none."""
        ...

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """The condition of N prompts, each entry shaped (N, ...)."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Data (N, ...) of images (N, 3|1, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3|1, H, W) in [-1, 1] of data (N, ...)."""
        ...


def labels_of(prompts: Sequence[Any], classes: int) -> list[int]:
    """Class labels, given as integers or as decimal strings.

    Raises:
        UserError: one is not an integer in [0, classes).
    """
    for p in prompts:
        text = str(p).strip()
        digits = text.isdecimal() and len(text) <= 18  # Python reads no number of thousands
        if not digits or int(text) >= classes:
            raise UserError(
                f"labels: {clipped(p)} is outside 0 to {classes - 1}; give one of those"
            )
    return [int(p) for p in prompts]


class Pixels:
    """A codec for models of pixels: data are images. Labels, where there are any, are integers.

    Args:
        classes: How many labels there are, not counting the null one; 0 for unconditional models.
        null: The label that stands for no label, if the network was trained with one.
    """

    def __init__(self, classes: int = 0, null: int | None = None) -> None:
        self.classes, self.null_label = classes, null
        self.null: Cond = None if null is None else {"class_labels": torch.tensor([null])}

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """Labels as {"class_labels": (N,) int64}; None for unconditional models.

        Raises:
            UserError: a label is not an integer in [0, classes).
        """
        if not self.classes:
            return None
        return {"class_labels": torch.tensor(labels_of(prompts, self.classes))}

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@dataclass
class Teacher:
    """A pretrained model: its denoiser, its codec, and the shape of one datum without the batch."""

    denoiser: Denoiser
    codec: Codec
    shape: tuple[int, ...]
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # what it was loaded with
