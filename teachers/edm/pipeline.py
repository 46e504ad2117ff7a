"""The pipeline that samples students of EDM2's latents, and decodes them (arXiv:2312.02696)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConsistencyModelPipeline
from torch import Tensor


class EDM2LatentsPipeline(ConsistencyModelPipeline):
    """A consistency model's pipeline whose samples are latents, which a VAE decodes to images.

    Args:
        vae: An AutoencoderKL, whose images have pixels in [0, 1], as EDM2 uses it.
        latents: A `scale` and a `bias` per channel, from the VAE's raw latents to the network's.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self, unet: Any, scheduler: Any, vae: Any, latents: dict[str, Any] | None = None
    ) -> None:
        super().__init__(unet, scheduler)
        self.register_modules(vae=vae)
        self.register_to_config(latents=latents or {"scale": [1.0], "bias": [0.0]})

    def postprocess_image(self, sample: Tensor, output_type: str = "pil") -> Any:
        """Images of latents (B, C, H, W), in the form that `output_type` names."""
        known: Any = self.config["latents"]
        scale, bias = (torch.tensor(known[k]).to(sample)[:, None, None] for k in ("scale", "bias"))
        raw = ((sample - bias) / scale).to(self.vae.dtype)
        images = self.vae.decode(raw).sample.clamp(0, 1)
        return super().postprocess_image(2 * images - 1, output_type)
