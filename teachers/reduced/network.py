"""UNets of diffusers without some of their layers, or with some in another form; the config names
both.

Stock configs say how many layers a stage has, and not which ones: a UNet that lacks a single
residual block or attention has no stock form. Here each removed layer is replaced by one without
weights that passes its input on, which is what a residual layer of zero does.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from teachers.reduced.layers import change

REMOVED = "removed_units"  # the key of a config: the names of the layers that are not there
CHANGED = "changed_units"  # by the name of a layer, its kind in `layers.KINDS` and its settings


class Removed(nn.Module):
    """In a residual layer's place: its input (B, ...) is its output."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        return hidden_states if return_dict else (hidden_states,)


class Reduced:
    """Mixin of diffusers' networks: made of its config without the removed layers, and with others
    in another form.

    Raises:
        ValueError: the config names layers that cannot be changed so.
    """

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        settings = dict(config or {})
        removed, changed = [*settings.pop(REMOVED, ())], {**settings.pop(CHANGED, {})}
        made = super().from_config(settings, return_unused_kwargs, **kwargs)  # pyright: ignore
        network = made[0] if return_unused_kwargs else made
        for name in removed:
            if name.split(".")[-2:-1] not in (["resnets"], ["attentions"]):
                raise ValueError(f"{REMOVED}: {name!r} is no layer that can go")
            network.get_submodule(name)  # it raises where there is none
            network.set_submodule(name, Removed())
        for name, form in changed.items():
            change(network, name, form)
        network.register_to_config(**{REMOVED: removed, CHANGED: changed})
        return made


class ReducedUNet2DModel(Reduced, UNet2DModel):
    """A UNet2DModel with the changes that its config names."""


class ReducedUNet2DConditionModel(Reduced, UNet2DConditionModel):
    """A UNet2DConditionModel with the changes that its config names."""
