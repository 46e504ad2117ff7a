"""A UNet2DModel on the Haar coefficients of its images, as in WaveDiff (arXiv:2211.16152).

The transform is orthonormal, so noise N(0, I) stays N(0, I), and a process of images is the same
process of their coefficients: pipelines hold images, and only the network sees coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

NOISE = "noise_inputs"  # the key of a config: how many unit normals the network draws and reads


def mixed(x: Tensor) -> Tensor:
    """The sum and three differences of each four channels (B, 4C, H, W): its own inverse."""
    a, b, c, d = x.unflatten(1, (-1, 4)).unbind(2)
    rows = (a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)
    return torch.stack(rows, 2).flatten(1, 2) / 2


def haar(x: Tensor) -> Tensor:
    """Coefficients (B, 4C, H/2, W/2) of x (B, C, H, W): of each square of four pixels the average,
    twice, and the horizontal, vertical and diagonal differences, halved."""
    return mixed(F.pixel_unshuffle(x, 2))


def inverse_haar(x: Tensor) -> Tensor:
    """Images (B, C, H, W) of coefficients (B, 4C, H/2, W/2)."""
    return F.pixel_shuffle(mixed(x), 2)


class NoisyEmbedding(TimestepEmbedding):
    """A time embedding to which a function of fresh noise is added, at first 0."""

    def __init__(self, before: Any, inputs: int) -> None:
        width = before.linear_1.out_features
        super().__init__(before.linear_1.in_features, width)
        self.inputs, last = inputs, nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.noise = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), last)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        z = torch.randn(len(sample), self.inputs).to(sample)
        return super().forward(sample, condition) + self.noise(z)


class HaarUNet2DModel(UNet2DModel):
    """A UNet2DModel that turns images into coefficients and back; its config is that of images."""

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        outer = {k: (config or {})[k] for k in ("in_channels", "out_channels", "sample_size")}
        inner = {k: 4 * outer[k] for k in ("in_channels", "out_channels")}
        inner["sample_size"] = outer["sample_size"] // 2
        own = {k: v for k, v in dict(config or {}).items() if k != NOISE}
        made = super().from_config({**own, **inner}, return_unused_kwargs, **kwargs)
        network: Any = made[0] if return_unused_kwargs else made  # pyright: ignore
        if inputs := dict(config or {}).get(NOISE, 0):
            network.time_embedding = NoisyEmbedding(network.time_embedding, inputs)
        network.register_to_config(**outer, **{NOISE: inputs})
        return made

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True
    ) -> Any:
        out = super().forward(haar(sample), timestep, class_labels, return_dict=False)[0]
        out = inverse_haar(out)
        return UNet2DOutput(sample=out) if return_dict else (out,)
