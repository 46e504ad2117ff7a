"""Names of weights: those of the published files, and those of our networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Names(NamedTuple):
    """Published names and ours. In the names of blocks, {n} is a number.

    blocks: of the blocks.
    inside: of what a block holds.
    outside: of the other layers.
    """

    blocks: dict[str, str]
    inside: dict[str, str]
    outside: dict[str, str]


INSIDE = {"attn.qkv": "attention.qkv", "attn.proj": "attention.out", "mlp.fc1": "mlp.0",
          "mlp.fc2": "mlp.2", "norm1": "norm_1", "norm2": "norm_2"}  # fmt: skip
SIT = Names(
    {"blocks.{n}": "blocks.{n}"},
    {
        **INSIDE, "adaLN_modulation.1": "modulation", "attn.q_norm": "attention.norm_q",
        "attn.k_norm": "attention.norm_k", "mlp.w12": "mlp.both", "mlp.w3": "mlp.out",
    },
    {
        "x_embedder.proj": "patches", "pos_embed": "positions", "t_embedder.mlp": "time",
        "y_embedder.embedding_table": "labels", "final_layer.norm_final": "norm",
        "final_layer.adaLN_modulation.1": "modulation", "final_layer.linear": "out",
    },
)  # fmt: skip
UVIT = Names(
    {"in_blocks.{n}": "first.{n}", "mid_block": "middle.0", "out_blocks.{n}": "last.{n}"},
    {**INSIDE, "skip_linear": "skip"},
    {
        "patch_embed.proj": "patches", "pos_embed": "positions", "time_embed": "time",
        "label_emb": "labels", "decoder_pred": "out", "final_layer": "conv",
    },
)  # fmt: skip
# The tables of LightningDiT's rotary embedding, which are one tensor here.
ROPE = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def ours(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Published weights under our names; unknown names are kept."""
    result = {renamed(k, names): v for k, v in weights.items() if k not in ROPE}
    if all(k in weights for k in ROPE):
        result["turn"] = torch.stack([weights[k] for k in ROPE])
    return result


def published(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The inverse of `ours`."""
    back = Names(*({b: a for a, b in table.items()} for table in names))
    result = {renamed(k, back): v for k, v in weights.items() if k != "turn"}
    if "turn" in weights:
        result |= dict(zip(ROPE, weights["turn"], strict=True))
    return result


def renamed(name: str, names: Names) -> str:
    """A weight's name, with its block and its layer renamed."""
    for before, after in names.blocks.items():
        pattern = re.escape(before).replace(r"\{n\}", r"(\d+)")
        if match := re.match(rf"{pattern}\.", name):
            block = after.replace("{n}", match[1] if match.groups() else "")
            return f"{block}.{layer(name[match.end() :], names.inside)}"
    return layer(name, names.outside)


def layer(name: str, table: Mapping[str, str]) -> str:
    """The name with its first parts, those of a layer, replaced."""
    for before, after in table.items():
        if name == before or name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return name


def without_variance(weight: Tensor, channels: int) -> Tensor:
    """The weight or bias of a last layer without its learned variance.

    Args:
        weight: Rows (patch² 2C, …), of which the second C of each pixel are the variance.
        channels: C.
    """
    rows = weight.view(-1, 2 * channels, *weight.shape[1:])
    return rows[:, :channels].flatten(0, 1).contiguous()
