"""Layers of diffusers in another form: each is made of the stock layer, with that one's weights.

A network's config names them (`changed_units`), so that a network that is loaded makes the same
layers of new stock ones, and then reads their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from teachers.reduced.experts import experts
from teachers.reduced.pyramid import pyramid
from teachers.reduced.repeated import repeat


def heads(layer: Attention, keep: Sequence[int]) -> Attention:
    """The attention, in place, with some of its heads: the others' rows and columns are cut.

    Args:
        keep: The heads that stay, in order.

    Raises:
        ValueError: it has no such heads, or weights that its heads share.
    """
    if not isinstance(layer, Attention):
        raise ValueError(f"a {type(layer).__name__} is no attention")
    if share_weights(layer):
        raise ValueError("its heads share weights")
    check(keep, layer.heads, "heads")
    width = layer.inner_dim // layer.heads  # numbers of a head
    out: Any = layer.to_out
    places = torch.cat([torch.arange(h * width, (h + 1) * width) for h in keep])
    for name in ("to_q", "to_k", "to_v"):
        if (linear := getattr(layer, name)) is not None:
            setattr(layer, name, rows_of(linear, places))
    out[0] = columns_of(out[0], places)
    layer.heads = layer.sliceable_head_dim = len(keep)
    layer.inner_dim = layer.inner_kv_dim = len(places)
    return layer


def share_weights(layer: Attention) -> bool:
    """Whether heads of an attention share weights, so that none can be cut alone."""
    norms = [getattr(m, "weight", None) for m in (layer.norm_q, layer.norm_k)]
    width = layer.inner_dim // layer.heads
    shared = layer.add_k_proj is not None or layer.inner_kv_dim != layer.inner_dim
    return shared or any(w is not None and w.shape != (width,) for w in norms)


def neurons(layer: FeedForward, keep: Sequence[int]) -> FeedForward:
    """The feed-forward layer, in place, with some of its inner neurons, and their gates.

    Args:
        keep: The neurons that stay, in order.

    Raises:
        ValueError: it has no such neurons.
    """
    if not isinstance(layer, FeedForward):
        raise ValueError(f"a {type(layer).__name__} is no feed-forward layer")
    net: Any = layer.net
    into, out = net[0], net[2]
    width = out.in_features
    check(keep, width, "neurons")
    places = torch.tensor(keep)
    gates = into.proj.out_features // width  # 2 where half of them are gates
    into.proj = rows_of(into.proj, torch.cat([places + i * width for i in range(gates)]))
    net[2] = columns_of(out, places)
    return layer


def check(keep: Sequence[int], count: int, what: str) -> None:
    """Refuse places that are none, in no order, or outside.

    Raises:
        ValueError: saying so.
    """
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in keep)
    if not keep or not whole or [*keep] != sorted({*keep}) or not 0 <= keep[0] <= keep[-1] < count:
        raise ValueError(f"keep: give some of its {count} {what}, from 0 to {count - 1}, in order")


def rows_of(linear: nn.Linear, places: Tensor) -> nn.Linear:
    """The linear layer with some of its outputs."""
    bias = None if linear.bias is None else linear.bias[places]
    return linear_of(linear.weight[places], bias)


def columns_of(linear: nn.Linear, places: Tensor) -> nn.Linear:
    """The linear layer with some of its inputs."""
    return linear_of(linear.weight[:, places], linear.bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these values, (out, in) and (out,)."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


KINDS: dict[str, Callable[..., nn.Module]] = {
    "heads": heads,
    "neurons": neurons,
    "repeat": repeat,
    "pyramid": pyramid,
    "experts": experts,
}


def change(network: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
    """Put another form of a layer in its place.

    Args:
        name: Of the module in the network.
        settings: `kind`, a key of `KINDS`, and that function's arguments beside the layer.

    Raises:
        ValueError: there is no such layer or kind, or these are no settings of it.
    """
    rest = {k: v for k, v in settings.items() if k != "kind"}
    function = KINDS.get(str(settings.get("kind")))
    if function is None:
        raise ValueError(f"kind: give one of {', '.join(KINDS)}")
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError("there is no such layer") from None
    try:
        network.set_submodule(name, function(layer, **rest))
    except TypeError:
        known = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        raise ValueError(f"a layer of kind {settings['kind']} has {', '.join(known)}") from None
