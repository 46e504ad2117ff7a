"""What the names and shapes of a file's tensors say: its format, its model, its rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from students.metadata.header import TensorInfo

Tensors = Mapping[str, TensorInfo]

# The ends of a LoRA's tensors: the smaller factor A (rank, in, …), by format.
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight",
        ".lora_A.default.weight", ".lora_linear_layer.down.weight")  # fmt: skip
OTHER_ADAPTERS = {"hada_w1": "LoHa", "lokr_w1": "LoKr", "dora_scale": "DoRA",
                  "lora_magnitude_vector": "DoRA"}  # fmt: skip
# The first that matches any tensor's name is the format of a LoRA.
FORMATS = {
    r"lora_(unet|te\d?|transformer)_": "kohya keys",
    r"(unet|transformer|text_encoder(_2)?)\.": "diffusers keys",
    r"diffusion_model\.": "ComfyUI keys",
    r"base_model\.model\.": "PEFT keys",
}
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
# The first that matches any tensor's name is the model. None: a UNet, known by a width.
MODELS: dict[str, str | None] = {
    r"conditioner\.embedders\.1\.": "SDXL",
    r"double_blocks\.|single_transformer_blocks": "FLUX",
    r"joint_blocks|context_embedder": "Stable Diffusion 3",
    r"img_mod|txt_mlp|img_mlp": "Qwen-Image",
    r"noise_refiner|context_refiner": "Lumina 2 or Z-Image",
    r"(input|output|down|up|middle|mid)_blocks?[._]": None,
    r"add_k_proj": "Stable Diffusion 3",
    r"\bffn[._](0|2|net)|cross_attn": "Wan",
    r"attn1[._]to_q": "SANA or PixArt",
}
# What diffusers' and DMD2's distillation scripts adapt and style LoRAs seldom do.
DISTILLATION = (r"conv1|in_layers[._]2", r"time_emb_proj|emb_layers[._]1")


@dataclass(frozen=True)
class Layers:
    """What a file's tensors are.

    Args:
        kind: Such as "LoRA, kohya keys, rank 64, 722 pairs".
        model: Its model family; "" if the tensors do not say.
        lora: Whether it is a LoRA.
        like_distillation: Whether it adapts the layers that distillation scripts adapt.
        reads_guidance: Whether the network has an input for the guidance scale.
    """

    kind: str
    model: str
    lora: bool
    like_distillation: bool
    reads_guidance: bool


def read_layers(tensors: Tensors) -> Layers:
    """What a file is, by the names and shapes of its tensors."""
    down = {name: info.shape for name, info in tensors.items() if name.endswith(DOWN)}
    model = model_of(tensors)
    reads = any("cond_proj" in n or "time_embed.cond" in n for n in tensors)
    if not down:
        other = next((v for k, v in OTHER_ADAPTERS.items() if any(k in n for n in tensors)), None)
        kind = f"{other}, {len(tensors)} tensors" if other else whole_kind(tensors)
        return Layers(kind, model, False, False, reads)
    ranks = sorted({shape[0] if shape else 0 for shape in down.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    keys = next((v for k, v in FORMATS.items() if any(re.match(k, n) for n in down)), "bare keys")
    like = all(any(re.search(pattern, name) for name in down) for pattern in DISTILLATION)
    return Layers(f"LoRA, {keys}, {rank}, {len(down)} pairs", model, True, like, reads)


def whole_kind(tensors: Tensors) -> str:
    """What a file without an adapter's tensors is."""
    if any(n.startswith(("first_stage_model.", "vae.")) for n in tensors):
        return f"a whole checkpoint, {len(tensors)} tensors"
    return f"weights of one network, {len(tensors)} tensors" if tensors else "no tensors"


def model_of(tensors: Tensors) -> str:
    """The model family; "" if names and shapes do not say."""
    for pattern, model in MODELS.items():
        if any(re.search(pattern, name) for name in tensors):
            return unet_model(tensors) if model is None else model
    return ""


def unet_model(tensors: Tensors) -> str:
    """Which UNet it is, by the width of the text that its cross-attention reads."""
    for name, info in tensors.items():
        reads_text = re.search(r"attn2[._](processor[._])?to_[kv]", name)
        if reads_text and not re.search(r"lora_up|lora_B|lora\.up|alpha$", name):
            width = info.shape[1] if len(info.shape) > 1 else 0
            return WIDTHS.get(width, f"a UNet that reads text of width {width}")
    return "a UNet"
