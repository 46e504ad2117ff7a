"""Outlines of well-known checkpoints: their shapes, without a weight.

With them a run can be planned before anything is downloaded. The networks are the real classes with
the published configs, created without memory. Of conditions only the shapes are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from teachers.catalogue.loading import families
from teachers.catalogue.published import OUTLINES, Outline
from teachers.conditions import PICTURE
from teachers.denoiser import Cond
from teachers.edm.model import EDM, EDMModel
from teachers.errors import UserError, nearest, teacher_at
from teachers.families.unet import UNet
from teachers.imagenet.model import MODELS
from teachers.quantised import DTYPES, FORMS, Precision, quantise
from teachers.storage.diffusers_config import read
from teachers.teacher import Codec, Teacher


class OutlineCodec(Codec):
    """A codec whose conditions and data have the right shapes and no content."""

    def __init__(self, outline: Outline, size: tuple[int, int]) -> None:
        self.outline, self.size, self.classes = outline, size, outline.classes

    @property
    def null(self) -> Cond:
        return self.condition([""])

    def condition(self, prompts: Sequence[Any]) -> Cond:
        """Placeholder conditions, each entry (N, ...)."""
        shapes = self.outline.cond
        if PICTURE in shapes:  # it is as large as the samples
            sides = tuple(side // self.outline.factor for side in self.size)
            shapes = {**shapes, PICTURE: (shapes[PICTURE][0], *sides)}
        return {
            k: torch.ones(
                len(prompts),
                *shape,
                dtype=torch.long if k in self.outline.integers else torch.float32,
            )
            for k, shape in shapes.items()
        }

    def encode(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), *self.outline.shape)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.new_zeros(len(latents), 3, *self.size)


def outline(
    source: str,
    without: AbstractContextManager[Any],
    size: int | None = None,
    precision: Precision = "fp32",
) -> Teacher:
    """A known checkpoint's teacher, whose network has shapes and no values.

    Args:
        without: The context that creates networks without memory: a FakeTensorMode, or the meta
            device.

    Raises:
        UserError: it is not among OUTLINES.
    """
    if source not in OUTLINES:
        raise UserError(
            f"{teacher_at(source)}: not on this machine, and no known outline; download it first, "
            f"or name a known one: {nearest(source, OUTLINES)}"
        )
    return outlined(OUTLINES[source], source, without, size, precision)


def outlined(
    known: Outline,
    source: str,
    without: AbstractContextManager[Any],
    size: int | None = None,
    precision: Precision = "fp32",
) -> Teacher:
    """The teacher of an outline; arguments as for `outline`."""
    import diffusers

    # the loader of UNets is a function of its own, which does not name the class
    special = UNet if known.pipeline in UNet.PIPELINES else None
    models = {**MODELS, "EDMModel": (EDM, EDMModel)}
    kind, made = models.get(known.network, (special, None))
    kind = kind or families()[known.pipeline].args[0]
    shape = known.shape
    if size is not None:
        shape = (shape[0], size // known.factor, size // known.factor)
    name, config = known.scheduler
    config = kind.configured(config, shape, None)
    schedule = read(name, config, teacher_at(source), kind.tokens(shape))
    with without, dtype_of_new(DTYPES[precision]):
        backbone = (made or getattr(diffusers, known.network)).from_config(known.config)
        if precision in FORMS:
            quantise(backbone, precision)
    network = kind(backbone, schedule, known.factor)
    pixels = (shape[-2] * known.factor, shape[-1] * known.factor)
    network.eval().requires_grad_(False)
    codec = OutlineCodec(known, pixels)
    codec.pictures = kind.PICTURES
    return Teacher(network, codec, shape, source)


@contextmanager
def dtype_of_new(dtype: torch.dtype) -> Iterator[None]:
    """Create networks in this type within the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
