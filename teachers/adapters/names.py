"""The names by which LoRA files of each origin call a network's layers.

| origin | the name of a layer in a file |
|---|---|
| diffusers and PEFT | the module's path |
| diffusers before 0.22 | the path, with `.processor.to_q_lora` for `.to_q` |
| kohya | the path in diffusers or in the original code, with underscores for its dots |
| ComfyUI | the path in the original code: `ldm.py` for UNets, `original.py` for transformers |
| BFL | the path in Black Forest Labs' code |
| XLabs | BFL's blocks, with `processor.qkv_lora1` and the like |

One layer of the original code may be several here, such as `qkv`: then the rows of its output
belong to them in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from teachers.adapters import original
from teachers.adapters.ldm import ldm_names
from teachers.adapters.original import ADDED, QKV, Place, blocks
from teachers.errors import UserError

XLABS = {
    **blocks("double_blocks", "transformer_blocks", {
        "processor.qkv_lora1": QKV, "processor.qkv_lora2": ADDED,
        "processor.proj_lora1": "attn.to_out.0", "processor.proj_lora2": "attn.to_add_out",
    }),
    **blocks("single_blocks", "single_transformer_blocks", {
        "processor.qkv_lora": QKV, "processor.proj_lora": "proj_out",
    }),
}  # fmt: skip
OLD_OUT = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
           "out_proj": "to_out"}  # fmt: skip


def places(part: str, network: nn.Module) -> dict[str, Place]:
    """The layers of a network by every name that a file may have for them, dots as underscores.

    Args:
        part: The component of the pipeline that it is.
    """
    layers = [k for k, m in network.named_modules() if isinstance(getattr(m, "weight", None),
              nn.Parameter)]  # fmt: skip
    named = [(k, Place((k,))) for k in layers]
    if part.startswith("text_encoder"):
        named += list(_encoder(layers))
    named += [(old, place) for k, place in named if (old := _old_name(k)) is not None]
    if type(network).__name__ == "UNet2DConditionModel":
        named += list(_ldm(layers, network))
    named += [*original.places(network).items(), *original.expanded(network, XLABS).items()]
    return {k.replace(".", "_"): v for k, v in named}


def _encoder(layers: list[str]) -> Iterator[tuple[str, Place]]:
    """A text encoder's layers with and without CLIP's wrapper, which transformers 5 leaves off."""
    for name in layers:
        bare = name.removeprefix("text_model.")
        yield (bare if bare != name else f"text_model.{name}"), Place((name,))


def _old_name(path: str) -> str | None:
    """The name that diffusers gave an attention's layer before PEFT; None for other layers."""
    match = re.fullmatch(r"(.+)\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)", path)
    if match is None:
        return None
    infix = "." if match[2].endswith("_proj") else ".processor."
    return f"{match[1]}{infix}{OLD_OUT.get(match[2], match[2])}_lora"


def _ldm(layers: list[str], network: Any) -> Iterator[tuple[str, Place]]:
    for layer in layers:
        try:
            yield ldm_names([layer], network.config)[layer], Place((layer,))
        except UserError:  # a block that LDM's UNet lacks
            continue


# ---- components


PREFIXES = {  # of keys, by the component; the longest that fits is taken
    "network": ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model.",
                "lora_unet_", "lora_transformer_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_",
                     "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_", "text_encoders.t5xxl.transformer."),
}  # fmt: skip


def split(name: str, network: str, encoders: set[str]) -> tuple[str, str]:
    """The component that a layer's name in a file belongs to, and the rest of the name.

    Args:
        network: The component that is the denoiser, which names without a prefix belong to.
        encoders: The text encoders that the pipeline has.
    """
    name = name.removeprefix("base_model.model.")
    fits = [
        (prefix, part)
        for part, prefixes in PREFIXES.items()
        for prefix in prefixes
        if name.startswith(prefix)
    ]
    if not fits:
        return network, name
    prefix, part = max(fits, key=lambda fit: len(fit[0]))
    part = network if part == "network" else part
    if part == "text_encoder_3" and part not in encoders:  # FLUX has its T5 in second place
        part = "text_encoder_2"
    return part, name.removeprefix(prefix)
