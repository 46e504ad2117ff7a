"""LightningDiT (arXiv:2501.01423): SiT's recipe with rotary positions, RMSNorm and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from teachers.imagenet.parts import (
    SINUSOIDS,
    Attention,
    RMSNorm,
    SwiGLU,
    modulated,
    positions,
    rotation,
    sinusoids,
    time_embedding,
    to_image,
    to_tokens,
)


def norm_of(width: int, rms: bool) -> nn.Module:
    """A block's norm: RMSNorm, or LayerNorm without weights."""
    return RMSNorm(width) if rms else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class LightningDiTBlock(nn.Module):
    """Attention and a two-layer network, each scaled, shifted and gated by the condition.

    Args:
        gated, rms, qk_norm, shifts: As LightningDiTModel has them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        gated: bool = True,
        rms: bool = True,
        qk_norm: bool = False,
        shifts: bool = True,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norm_of(width, rms), norm_of(width, rms)
        kind = (RMSNorm if rms else nn.LayerNorm) if qk_norm else None
        self.attention = Attention(width, heads, norm=kind)
        self.mlp: nn.Module = SwiGLU(width, hidden)
        if not gated:
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
            )
        self.shifts, self.modulation = shifts, nn.Linear(width, (6 if shifts else 4) * width)

    def forward(self, x: Tensor, cond: Tensor, turn: Tensor | None) -> Tensor:
        """x (B, T, D), under cond (B, D); `turn` is of `rotation`."""
        parts = list(self.modulation(nn.functional.silu(cond)).chunk(6 if self.shifts else 4, 1))
        if not self.shifts:
            parts = [None, *parts[:2], None, *parts[2:]]
        shift, scale, gate, shift_2, scale_2, gate_2 = parts
        x = x + gate[:, None] * self.attention(modulated(self.norm_1(x), shift, scale), turn)
        return x + gate_2[:, None] * self.mlp(modulated(self.norm_2(x), shift_2, scale_2))


class LightningDiTModel(ModelMixin, ConfigMixin):
    """LightningDiT as a network of rectified flow: x_t = (1 - σ) x + σ ε, of which it gives ε - x.

    Its own time is 1 - σ, and it was trained to give dx/dt = x - ε.

    Args:
        sample_size, in_channels: Of the latents.
        num_classes: Without the null class, which is the last.
        mlp_width: Hidden features of a block's two-layer network.
        rope: Rotate queries and keys by position.
        gated: SwiGLU as two-layer networks; else GELU.
        rms: RMSNorm as norms; else LayerNorm.
        qk_norm: Normalise queries and keys.
        shifts: Shift by the condition in the blocks, not only scale.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        out_channels: int = 32,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_width: int = 3072,
        num_classes: int = 1000,
        rope: bool = True,
        gated: bool = True,
        rms: bool = True,
        qk_norm: bool = False,
        shifts: bool = True,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        side = sample_size // patch_size
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.register_buffer("positions", positions(width, side))
        turn = rotation(width // heads, side) if rope else None
        self.register_buffer("turn", turn)
        self.time = time_embedding(width)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(width, heads, mlp_width, gated, rms, qk_norm, shifts)
            for _ in range(depth)
        )
        self.norm = norm_of(width, rms)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_size**2 * out_channels)

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
        dtype = self.out.weight.dtype
        sigma = torch.as_tensor(timestep, device=sample.device).expand(len(sample)) / 1000
        x = to_tokens(self.patches(sample.to(dtype))) + self.positions.to(dtype)  # pyright: ignore
        cond = self.time(sinusoids(1 - sigma, SINUSOIDS).to(dtype)) + self.labels(class_labels)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, cond, self.turn)  # pyright: ignore
            else:
                x = block(x, cond, self.turn)
        shift, scale = self.modulation(nn.functional.silu(cond)).chunk(2, 1)
        x = self.out(modulated(self.norm(x), shift, scale))
        flow = -to_image(x, self.config["patch_size"])
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)
