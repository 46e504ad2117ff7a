"""UNets of diffusers that do other work than stock ones: without layers, or with layers in another
form; the config names both.

Stock configs say how many layers a stage has, and not which ones: a UNet that lacks a single
residual block or attention has no stock form. Here each removed layer is replaced by one without
weights that passes its input on, which is what a residual layer of zero does.

"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from teachers.reduced.layers import change

# Keys of a config. The names of the layers that are not there:
REMOVED = "removed_units"
# By the name of a layer, its kind in `layers.KINDS` and its settings:
CHANGED = "changed_units"
# Of one_pass.py. The N times of the decoder, as the network reads times, from noise to data:
TIMES = "decoder_times"
# In the network's output, the shares of its input and of the N outputs of the decoder:
SHARES = "decoder_shares"
# Of feedback.py. Calls from one that runs the inner levels to the next, and the width of what
# carries them on:
INTERVAL = "feedback_interval"
WIDTH = "feedback_width"
OWN = (REMOVED, CHANGED, TIMES, SHARES, INTERVAL, WIDTH)
LISTS = ("resnets", "attentions", "transformer_blocks")  # whose modules can go


class Removed(nn.Module):
    """In a residual layer's place: its input (B, ...) is its output."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        return hidden_states if return_dict else (hidden_states,)


class Reduced:
    """Mixin of diffusers' networks: a network is made of its config and of the keys above.

    Raises:
        ValueError: the config names layers that cannot be changed so.
    """

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        stock = dict(config or {})
        own = {k: stock.pop(k) for k in OWN if k in stock}
        made = super().from_config(stock, return_unused_kwargs, **kwargs)  # pyright: ignore
        network = made[0] if return_unused_kwargs else made
        removed, changed = [*own.get(REMOVED, ())], {**own.get(CHANGED, {})}
        for name in removed:
            if name.split(".")[-2:-1] not in ([kind] for kind in LISTS):
                raise ValueError(f"{REMOVED}: {name!r} is no layer that can go")
            network.get_submodule(name)  # it raises where there is none
            network.set_submodule(name, Removed())
        for name, form in changed.items():
            change(network, name, form)
        network.register_to_config(**{**own, REMOVED: removed, CHANGED: changed})
        network.complete()
        return made

    def complete(self) -> None:
        """Add the modules that the keys above name; the layers that go are gone already."""


class ReducedUNet2DModel(Reduced, UNet2DModel):
    """A UNet2DModel with the changes that its config names."""


class ReducedUNet2DConditionModel(Reduced, UNet2DConditionModel):
    """A UNet2DConditionModel with the changes that its config names."""
