"""The pipeline that samples students of EDM2's latents, and decodes them (arXiv:2312.02696).

Diffusers reads the types of its arguments, and before 0.39 knows them only as classes.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, CMStochasticIterativeScheduler, ConsistencyModelPipeline
from torch import Tensor, nn

UNCHANGED = {"scale": [1.0], "bias": [0.0]}  # diffusers passes no setting without a default


class EDM2LatentsPipeline(ConsistencyModelPipeline):
    """A consistency model's pipeline whose samples are latents, which a VAE decodes to images.

    Args:
        vae: An AutoencoderKL, whose images have pixels in [0, 1], as EDM2 uses it.
        latents: A `scale` and a `bias` per channel, from the VAE's raw latents to the network's.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: nn.Module,
        scheduler: CMStochasticIterativeScheduler,
        vae: AutoencoderKL,
        latents: dict = UNCHANGED,
    ) -> None:
        super().__init__(unet, scheduler)  # pyright: ignore[reportArgumentType]
        self.register_modules(vae=vae)
        self.register_to_config(latents=latents)

    def postprocess_image(self, sample: Tensor, output_type: str = "pil") -> Any:
        """Images of latents (B, C, H, W), in the form that `output_type` names."""
        known: Any = self.config["latents"]
        scale, bias = (torch.tensor(known[k]).to(sample)[:, None, None] for k in ("scale", "bias"))
        raw = ((sample - bias) / scale).to(self.vae.dtype)
        images = self.vae.decode(raw).sample.clamp(0, 1)
        return super().postprocess_image(2 * images - 1, output_type)
