"""U-ViT (arXiv:2209.12152): time and label are tokens, and long skips join its halves."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from teachers.imagenet.parts import Attention, sinusoids, to_image, to_tokens


class UViTBlock(nn.Module):
    """Attention and a two-layer network.

    Args:
        joins: Whether the block takes the tokens of an earlier one as well.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, bias: bool = False, joins: bool = False
    ) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if joins else None
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, earlier: Tensor | None = None) -> Tensor:
        """x and the earlier tokens, (B, T, D)."""
        if self.skip is not None:
            assert earlier is not None
            x = self.skip(torch.cat([x, earlier], -1))
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class UViTModel(ModelMixin, ConfigMixin):
    """U-ViT, which predicts ε.

    Args:
        sample_size, in_channels: Of the latents.
        depth: The number of blocks, which is odd: half of it before the middle one.
        num_classes: Without the null class, which is the last.
        mlp_width: Hidden features of a block's two-layer network.
        time_mlp: Embed the time's sinusoids by two layers.
        qkv_bias: Whether queries, keys and values have biases.
        final_conv: Whether a convolution follows the patches.
        time_scale: Units of the network's own time in one index of the scheduler, which has index 0
            where the network has one unit: see `schedule` in checkpoints.py.
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
        depth: int = 29,
        heads: int = 16,
        mlp_width: int = 4608,
        num_classes: int = 1000,
        time_mlp: bool = False,
        qkv_bias: bool = False,
        final_conv: bool = False,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        tokens = 2 + (sample_size // patch_size) ** 2
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.time: nn.Module = nn.Identity()
        if time_mlp:
            layers = nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
            self.time = nn.Sequential(*layers)
        self.labels = nn.Embedding(num_classes + 1, width)
        sizes = (width, heads, mlp_width, qkv_bias)
        self.first = nn.ModuleList(UViTBlock(*sizes) for _ in range(depth // 2))
        self.middle = nn.ModuleList([UViTBlock(*sizes)])  # a list, as quantisation looks for lists
        self.last = nn.ModuleList(UViTBlock(*sizes, joins=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch_size**2 * out_channels)
        self.conv = (
            nn.Conv2d(out_channels, out_channels, 3, padding=1) if final_conv else nn.Identity()
        )

    def run(self, block: nn.Module, *tokens: Tensor) -> Tensor:
        """A block's output; its activations are recomputed where that is asked for."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *tokens)  # pyright: ignore
        return block(*tokens)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """ε, shaped like `sample` (B, C, H, W).

        Args:
            timestep: The scheduler's index, a scalar or (B,); may be fractional.
            class_labels: (B,) integers; num_classes means no label.
        """
        dtype, width = self.out.weight.dtype, self.config["width"]
        index = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        time = self.time(sinusoids(self.config["time_scale"] * (index + 1), width).to(dtype))
        extras = torch.stack([self.labels(class_labels), time], 1)
        x = torch.cat([extras, to_tokens(self.patches(sample.to(dtype)))], 1) + self.positions
        kept = []
        for block in self.first:
            kept.append(x := self.run(block, x))
        x = self.run(self.middle[0], x)
        for block in self.last:
            x = self.run(block, x, kept.pop())
        x = self.out(self.norm(x))[:, extras.shape[1] :]
        eps = self.conv(to_image(x, self.config["patch_size"]))
        return Transformer2DModelOutput(sample=eps) if return_dict else (eps,)
