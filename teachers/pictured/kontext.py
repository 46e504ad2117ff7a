"""FLUX.1 Kontext (arXiv:2506.15742): the picture to edit follows the noise, as more tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teachers.conditions import PICTURE, Pictured
from teachers.families.base import Prompted
from teachers.families.flux import Flux, places


def latents_of(codec: Prompted, prompts: list[Pictured]) -> Tensor:
    """The pictures' latents (N, C, H, W); one picture at a time, for memory's sake."""
    return torch.cat([codec.encode(p.picture[None]) for p in prompts])


class Kontext(Flux):
    """FLUX.1's network; the first of the three numbers of a place is 1 for the picture's tokens.

    Pictures are as large as samples. The stock pipeline resizes them to one of its own sizes,
    unless it is called with `_auto_resize=False`.
    """

    PIPELINES = ("FluxKontextPipeline",)
    PICTURES = "edit"

    def image(self, x_t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        picture = cond[PICTURE]
        tokens = torch.cat([self.pack(x_t), self.pack(picture.to(x_t))], 1)
        return tokens, torch.cat([places(x_t), places(picture, 1)])

    @classmethod
    def embed_pictures(cls, codec: Prompted, prompts: list[Pictured]) -> dict[str, Tensor]:
        return {PICTURE: latents_of(codec, prompts)}

    @classmethod
    def picture_arguments(cls, prompts: list[Pictured]) -> dict[str, Any]:
        """The pictures in [0, 1], and that samples are as large as they are."""
        pictures = torch.stack([p.picture for p in prompts]) / 2 + 0.5
        area = pictures.shape[-2] * pictures.shape[-1]
        return {"image": pictures, "max_area": area, "_auto_resize": False}
