"""FLUX.1's weights under Black Forest Labs' names, as diffusers' network has them.

Diffusers converts these names too, but at a width of 3072 alone, and drops what it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PREFIX = "model.diffusion_model."  # of the network's names in files that hold other parts as well
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
EMBEDDING = "time_text_embed"
# The layers of a block, and the modules that they are here. Several share the rows of one layer.
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": QKV, "txt_attn.qkv": ADDED,
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",), "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
}  # fmt: skip
SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",), "linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",),
}  # fmt: skip
OUTER: dict[str, str] = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": f"{EMBEDDING}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{EMBEDDING}.timestep_embedder.linear_2",
    "vector_in.in_layer": f"{EMBEDDING}.text_embedder.linear_1",
    "vector_in.out_layer": f"{EMBEDDING}.text_embedder.linear_2",
    "guidance_in.in_layer": f"{EMBEDDING}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{EMBEDDING}.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
SWAPPED = "norm_out.linear"  # its scale and shift are in the other order


def holds(names: Iterable[str]) -> bool:
    """Whether these are names of FLUX.1's blocks."""
    return any(name.removeprefix(PREFIX).startswith("double_blocks.") for name in names)


def places(name: str) -> tuple[str, ...]:
    """The names here of the weights that share the rows of a published one; none if unknown."""
    layer, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf
    if match := re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", layer):
        table, block = (
            (DOUBLE, "transformer_blocks")
            if match[1] == "double"
            else (SINGLE, "single_transformer_blocks")
        )
        modules = table.get(match[3], ())
        return tuple(f"{block}.{match[2]}.{module}.{leaf}" for module in modules)
    return (f"{OUTER[layer]}.{leaf}",) if layer in OUTER else ()


def ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under diffusers' names; unknown names are kept.

    Raises:
        KeyError: the embedding of patches is missing, which tells the width.
    """
    bare = {k.removeprefix(PREFIX): v for k, v in weights.items()}
    width = len(bare["img_in.weight"])
    result: dict[str, Tensor] = {}
    for name, value in bare.items():
        to = places(name) or (name,)
        rows = [width] * (len(to) - 1)
        parts = value.split([*rows, len(value) - sum(rows)])
        for place, part in zip(to, parts, strict=True):
            turned = place.startswith(SWAPPED)
            result[place] = torch.cat(part.chunk(2)[::-1]) if turned else part
    return result
