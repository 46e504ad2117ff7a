"""LDM's names of a UNet2DConditionModel's layers: those of SD 1.x's and SDXL's original code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from teachers.errors import UserError

OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def ldm_names(modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """LDM's name of each of a UNet2DConditionModel's modules, or of its weights.

    LDM counts a block for each resnet and each resampler: with L resnets a level, the resnet r of
    level b is input block 1 + b (L + 1) + r, and output block b (L + 1) + r.

    Args:
        modules: Names in diffusers' UNet; a trailing weight or bias stays as it is.
        config: The UNet's, for `layers_per_block` and `up_block_types`.

    Raises:
        UserError: the UNet has a part that LDM's does not.
    """
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise UserError(f"single file: layers_per_block {layers!r} has no LDM form; use a number")
    attends = ["Attn" in kind for kind in config["up_block_types"]]
    return {name: ldm_name(name, layers, attends) for name in modules}


def ldm_name(name: str, layers: int, attends: list[bool]) -> str:
    for prefix, new in OUTER.items():
        if name == prefix or name.startswith(prefix + "."):
            return new + name.removeprefix(prefix)
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, level, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = level * (layers + 1) + (1 if side == "down" else 0)
        block = "input_blocks" if side == "down" else "output_blocks"
        if part == "resnets":
            return f"{block}.{first + index}.0.{resnet(rest)}"
        if part == "attentions":
            return f"{block}.{first + index}.1.{rest}"
        if part == "downsamplers":
            return f"{block}.{first + layers}.0." + re.sub(r"^conv\b", "op", rest)
        if part == "upsamplers":
            return f"{block}.{first + layers}.{2 if attends[level] else 1}.{rest}"
    match = re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", name)
    if match and (place := MIDDLE.get(match[1])) is not None:
        return f"middle_block.{place}.{match[2] if place == '1' else resnet(match[2])}"
    raise UserError(
        f"single file: the UNet's {name!r} has no place in LDM's UNet; use the diffusers folder"
    )


def resnet(name: str) -> str:
    """A part of a resnet, by LDM's name."""
    part, dot, rest = name.partition(".")
    if part not in RESNET:
        raise UserError(
            f"single file: a resnet's {name!r} has no place in LDM's; use the diffusers folder"
        )
    return RESNET[part] + dot + rest
