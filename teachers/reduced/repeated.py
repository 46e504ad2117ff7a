"""Layers that run several times in a row, each time with weights of their own.

SnapFusion, Li et al. 2023 (arXiv:2306.00980, section 3.1), gives the layers that are worth most for
their time copies. There a copy has the layer's weights; here its last layer is zero, so that the
network's output stays what it was until it learns.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


class Repeated(nn.Sequential):
    """Residual layers (B, ...) to (B, ...) one after another, all called with the same arguments
    beside their input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found: Any = hidden_states
        for layer in self:
            found = layer(found, *args, **kwargs)
            found = found if layer is self[-1] or not isinstance(found, tuple) else found[0]
        return found


def repeat(layer: nn.Module, times: int = 2) -> Repeated:
    """The layer and copies of it that begin as the identity.

    Args:
        times: How often it runs in all. A layer that is repeated already gets more copies.

    Raises:
        ValueError: the layer changes the shape of its input, or `times` is no more than it has.
    """
    last_layer(layer[0] if isinstance(layer, Repeated) else layer)
    made = layer if isinstance(layer, Repeated) else Repeated(layer)
    if not isinstance(times, int) or isinstance(times, bool) or times <= len(made):
        raise ValueError(f"times: give more than {len(made)}")
    for _ in range(times - len(made)):
        copy = deepcopy(made[-1])
        for p in last_layer(copy).parameters():
            nn.init.zeros_(p)
        made.append(copy)
    return made


def last_layer(layer: Any) -> nn.Module:
    """The last layer inside a residual layer, of whose output zero makes it the identity.

    Raises:
        ValueError: it is no residual layer that keeps the shape.
    """
    if isinstance(layer, Transformer2DModel) and layer.is_input_continuous:
        return layer.proj_out
    if isinstance(layer, ResnetBlock2D) and layer.output_scale_factor == 1:
        if layer.conv_shortcut is layer.upsample is layer.downsample is None:
            return layer.conv2
    elif isinstance(layer, Attention) and layer.rescale_output_factor == 1:
        out: Any = layer.to_out
        if layer.residual_connection:
            return out[0]
    raise ValueError(f"a {type(layer).__name__} here adds nothing to its own input")
