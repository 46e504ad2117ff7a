"""UNets of diffusers without some of their layers: the config names those that were removed.

Stock configs say how many layers a stage has, and not which ones: a UNet that lacks a single
residual block or attention has no stock form. Here each removed layer is replaced by one without
weights that passes its input on, which is what a residual layer of zero does.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

REMOVED = "removed_units"  # the key of a config: the names of the layers that are not there


class Removed(nn.Module):
    """In a residual layer's place: its input (B, ...) is its output."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        return hidden_states if return_dict else (hidden_states,)


class Reduced:
    """Mixin of diffusers' networks: a network is made of its config without the removed layers."""

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        own = {k: v for k, v in dict(config or {}).items() if k != REMOVED}
        made = super().from_config(own, return_unused_kwargs, **kwargs)  # pyright: ignore
        network = made[0] if return_unused_kwargs else made
        for name in (names := [*dict(config or {}).get(REMOVED, ())]):
            network.set_submodule(name, Removed())
        network.register_to_config(**{REMOVED: names})
        return made


class ReducedUNet2DModel(Reduced, UNet2DModel):
    """A UNet2DModel without the layers of its config's `removed_units`."""


class ReducedUNet2DConditionModel(Reduced, UNet2DConditionModel):
    """A UNet2DConditionModel without the layers of its config's `removed_units`."""
