"""Inpainting by Stable Diffusion 1.x and 2.x and SDXL: a UNet that also reads a masked picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from teachers.conditions import PICTURE, Cond, Pictured
from teachers.errors import UserError
from teachers.families.base import Pretrained, Prompted
from teachers.families.stable_diffusion import SDXL, StableDiffusion


class Inpainting(StableDiffusion):
    """Reads the noisy latents, the mask, and the latents of the picture that is grey in the mask.

    The stock pipeline samples the picture's latents from the VAE's posterior; this takes its mode.
    """

    PIPELINES = ("StableDiffusionInpaintPipeline",)
    PICTURES = "mask"

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        assert cond is not None
        return super().call(torch.cat([x_t, cond[PICTURE].to(x_t)], 1), t, cond, s)

    @classmethod
    def of(cls, pipe: Any, size: int | None, who: str) -> type[Pretrained]:
        read, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if read != 2 * latents + 1:
            raise UserError(
                f"{who}: unet/config.json: in_channels is {read}, and a network that inpaints has "
                f"{2 * latents + 1}; name the text-to-image pipeline in model_index.json"
            )
        if pipe.config.get("requires_aesthetics_score"):
            raise UserError(f"{who}: requires_aesthetics_score is not supported; give another")
        return cls

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        return (pipe.vae.config.latent_channels, *super().shape(pipe, size)[1:])

    @classmethod
    def embed_pictures(cls, codec: Prompted, prompts: list[Pictured]) -> dict[str, Tensor]:
        """Mask and masked latents (N, 1 + C, H, W); one picture at a time, for memory's sake."""
        entries: list[Tensor] = []
        for prompt in prompts:
            mask = masks_of([prompt])
            latents = codec.encode(prompt.picture[None] * (1 - mask))
            small = interpolate(mask, size=latents.shape[-2:]).to(latents)
            entries.append(torch.cat([small, latents], 1))
        return {PICTURE: torch.cat(entries)}

    @classmethod
    def picture_arguments(cls, prompts: list[Pictured]) -> dict[str, Any]:
        """The pictures in [0, 1], and the strength at which sampling begins at pure noise."""
        pictures = torch.stack([p.picture for p in prompts]) / 2 + 0.5
        return {"image": pictures, "mask_image": masks_of(prompts), "strength": 1.0}


class InpaintingXL(Inpainting, SDXL):
    """The same with SDXL's UNet and text encoders."""

    PIPELINES = ("StableDiffusionXLInpaintPipeline",)


def masks_of(prompts: list[Pictured]) -> Tensor:
    """Masks (N, 1, H, W) of zeros and ones; a prompt without one is painted anew everywhere."""
    masks = [torch.ones_like(p.picture[:1]) if p.mask is None else p.mask for p in prompts]
    return (torch.stack(masks) >= 0.5).float()
