"""The names by which LoRA files of each origin call a network's layers.

| origin | the name of a layer in a file |
|---|---|
| diffusers and PEFT | the module's path |
| diffusers before 0.22 | the path, with `.processor.to_q_lora` for `.to_q` |
| kohya | the path in diffusers or in the original code, with underscores for its dots |
| ComfyUI | the path in the original code: LDM's, Stability's (SD 3) or Black Forest Labs' (FLUX) |
| BFL | the path in Black Forest Labs' code |
| XLabs | BFL's blocks, with `processor.qkv_lora1` and the like |

One layer of the original code may be several here, such as `qkv`: then the rows of its output
belong to them in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from teachers.adapters.ldm import ldm_names
from teachers.errors import UserError
from teachers.storage import bfl


@dataclass(frozen=True)
class Place:
    """The modules that a layer of a file changes.

    swapped: Whether the file has the two halves of the output in the other order, as the original
        code has scale and shift of the last norm.
    """

    modules: tuple[str, ...]
    swapped: bool = False


BLOCK = {  # of an MMDiT: the image's stream of tokens, then the text's
    "qkv": (("attn.to_q", "attn.to_k", "attn.to_v"),
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    "proj": (("attn.to_out.0",), ("attn.to_add_out",)),
    "in": (("ff.net.0.proj",), ("ff_context.net.0.proj",)),
    "out": (("ff.net.2",), ("ff_context.net.2",)),
    "mod": (("norm1.linear",), ("norm1_context.linear",)),
}  # fmt: skip
BFL = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.0": "in", "mlp.2": "out", "mod.lin": "mod"}
SAI = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "in", "mlp.fc2": "out",
       "adaLN_modulation.1": "mod"}  # fmt: skip
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj_lora": ("proj_out",),
}
# A change of the layer whose scale and shift are in the other order is not read.
OUTER_FLUX = {old: new for old, new in bfl.OUTER.items() if new != bfl.SWAPPED}
OUTER_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": f"{bfl.EMBEDDING}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{bfl.EMBEDDING}.timestep_embedder.linear_2",
    "y_embedder.mlp.0": f"{bfl.EMBEDDING}.text_embedder.linear_1",
    "y_embedder.mlp.2": f"{bfl.EMBEDDING}.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
LAST_NORM = "final_layer.adaLN_modulation.1"
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
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        named += list(_ldm(layers, network))
    elif kind == "FluxTransformer2DModel":
        named += list(_flux(network))
    elif kind == "SD3Transformer2DModel":
        named += list(_sd3(network))
    known = set(layers)
    return {k.replace(".", "_"): v for k, v in named if known.issuperset(v.modules)}


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


def _flux(network: Any) -> Iterator[tuple[str, Place]]:
    for i in range(len(network.transformer_blocks)):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, prefix in enumerate(("img_", "txt_")):
            for name, role in BFL.items():
                yield f"{theirs}.{prefix}{name}", _in(ours, BLOCK[role][stream])
            for role in ("qkv", "proj"):
                name = f"{theirs}.processor.{role}_lora{stream + 1}"
                yield name, _in(ours, BLOCK[role][stream])
    for i in range(len(network.single_transformer_blocks)):
        for name, modules in SINGLE.items():
            yield f"single_blocks.{i}.{name}", _in(f"single_transformer_blocks.{i}", modules)
    yield from ((name, Place((path,))) for name, path in OUTER_FLUX.items())
    yield LAST_NORM, Place(("norm_out.linear",), swapped=True)


def _sd3(network: Any) -> Iterator[tuple[str, Place]]:
    for i, block in enumerate(network.transformer_blocks):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for stream, prefix in enumerate(("x_block", "context_block")):
            for name, role in SAI.items():
                # the last block's text stream ends in a norm of scale and shift
                swapped = role == "mod" and stream == 1 and block.context_pre_only
                yield f"{theirs}.{prefix}.{name}", _in(ours, BLOCK[role][stream], swapped)
        for role in ("qkv", "proj"):
            modules = tuple(m.replace("attn.", "attn2.") for m in BLOCK[role][0])
            yield f"{theirs}.x_block.attn2.{role}", _in(ours, modules)
    yield from ((name, Place((path,))) for name, path in OUTER_SD3.items())
    yield LAST_NORM, Place(("norm_out.linear",), swapped=True)


def _in(block: str, modules: tuple[str, ...], swapped: bool = False) -> Place:
    return Place(tuple(f"{block}.{m}" for m in modules), swapped)


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
