"""SiT (arXiv:2401.08740): DiT's transformer, trained on an interpolant between noise and data."""

from __future__ import annotations

from math import pi
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from teachers.imagenet.parts import (
    SINUSOIDS,
    Attention,
    modulated,
    positions,
    sinusoids,
    time_embedding,
    to_image,
    to_tokens,
)


class SiTBlock(nn.Module):
    """Attention and a two-layer network, each scaled, shifted and gated by the condition."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, T, D), under cond (B, D)."""
        parts = self.modulation(nn.functional.silu(cond)).chunk(6, 1)
        shift, scale, gate, shift_2, scale_2, gate_2 = parts
        x = x + gate[:, None] * self.attention(modulated(self.norm(x), shift, scale))
        return x + gate_2[:, None] * self.mlp(modulated(self.norm(x), shift_2, scale_2))


class SiTModel(ModelMixin, ConfigMixin):
    """SiT as a network of rectified flow: x_t = (1 - σ) x + σ ε, of which it gives ε - x.

    SiT's own time is 1 for data and 0 for noise, and it was trained to give dx/dt. Its paths:

    | interpolant | own x at time t | what is done |
    |---|---|---|
    | linear | t x + (1 - t) ε | t = 1 - σ, and the sign changes |
    | gvp | sin(πt/2) x + cos(πt/2) ε | x_t is scaled to the same σ/α on it, and ε - x is computed |

    Args:
        sample_size, in_channels: Of the latents.
        num_classes: Without the null class, which is the last.
        mlp_width: Hidden features of a block's two-layer network.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 4,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_width: int = 4608,
        num_classes: int = 1000,
        interpolant: str = "linear",
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.register_buffer("positions", positions(width, sample_size // patch_size))
        self.time = time_embedding(width)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_size**2 * out_channels)

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """dx/dt at SiT's own time t (B,), shaped like x (B, C, H, W)."""
        dtype = self.out.weight.dtype
        tokens = to_tokens(self.patches(x.to(dtype))) + self.positions.to(dtype)  # pyright: ignore
        cond = self.time(sinusoids(t, SINUSOIDS).to(dtype)) + self.labels(labels)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, cond)  # pyright: ignore
            else:
                tokens = block(tokens, cond)
        shift, scale = self.modulation(nn.functional.silu(cond)).chunk(2, 1)
        return to_image(
            self.out(modulated(self.norm(tokens), shift, scale)), self.config["patch_size"]
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """ε - x, shaped like `sample` (B, C, H, W), which is (1 - σ) x + σ ε.

        Args:
            timestep: 1000 σ, a scalar or (B,).
            class_labels: (B,) integers; num_classes means no label.
        """
        sigma = torch.as_tensor(timestep, device=sample.device).expand(len(sample)) / 1000
        if self.config["interpolant"] == "linear":
            flow = -self.velocity(sample, 1 - sigma, class_labels)
        else:
            flow = self.from_gvp(sample, sigma, class_labels)
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)

    def from_gvp(self, sample: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """ε - x of a network of SiT's generalised variance-preserving path."""
        angle = torch.atan2(sigma, 1 - sigma)
        view = (-1, *(1,) * (sample.ndim - 1))
        cos, sin = angle.cos().view(view), angle.sin().view(view)
        x = sample.float() / torch.hypot(1 - sigma, sigma).view(view)
        # dx/dt is -π/2 times v = cos ε - sin x
        v = self.velocity(x, 1 - 2 / pi * angle, labels).float() * (-2 / pi)
        return ((sin - cos) * x + (cos + sin) * v).to(sample.dtype)
