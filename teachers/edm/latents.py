"""The latents of EDM2's ImageNet-512 networks (arXiv:2312.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teachers.teacher import Pixels

# The module and the class of the pipeline, as a student's model_index.json names them.
PIPELINE = ["edm2_latents", "EDM2LatentsPipeline"]


class Latents(Pixels):
    """The codec of latent EDM2: a VAE's latents, each channel shifted and scaled to σ_data = ½.

    Without a VAE, data are latents: `encode` and `decode` return their input.

    Args:
        scale, bias: Per channel, from the VAE's raw latents to the network's.
        vae: A diffusers AutoencoderKL; EDM2 feeds it pixels in [0, 1], as is done here.
    """

    def __init__(
        self,
        classes: int,
        null: int | None,
        scale: Sequence[float],
        bias: Sequence[float],
        vae: Any = None,
    ) -> None:
        super().__init__(classes, null)
        self.vae = vae
        self.scale, self.bias = torch.tensor([*scale]), torch.tensor([*bias])

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "scale": self.scale, "bias": self.bias, "vae": self.vae}

    @property
    def factor(self) -> int:
        """Pixels per latent along one side; 1 without a VAE."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def pipeline(self, unet: Any, scheduler: Any) -> Any:
        """The pipeline that samples this network with this scheduler, and decodes."""
        from teachers.edm.pipeline import EDM2LatentsPipeline

        latents = {"scale": self.scale.tolist(), "bias": self.bias.tolist()}
        return EDM2LatentsPipeline(unet, scheduler, self.vae, latents)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images; without a VAE, the input."""
        if self.vae is None:
            return images
        raw = self.vae.to(images.device).encode((images + 1) / 2).latent_dist.sample()
        return raw * shaped(self.scale, raw) + shaped(self.bias, raw)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents; without a VAE, the input."""
        if self.vae is None:
            return latents
        raw = (latents - shaped(self.bias, latents)) / shaped(self.scale, latents)
        return 2 * self.vae.to(latents.device).decode(raw).sample.clamp(0, 1) - 1


def shaped(values: Tensor, x: Tensor) -> Tensor:
    """(C,) reshaped to broadcast against x (B, C, H, W)."""
    return values.to(x)[:, None, None]
