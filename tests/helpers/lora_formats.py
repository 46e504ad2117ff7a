"""LoRA files with random factors, in the key format of each origin."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from teachers.adapters.ldm import ldm_names

State = dict[str, Tensor]


def factors(
    network: nn.Module, modules: list[str], rank: int = 2, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """By module, (down, up) in the layout of its weight; the change is about a tenth of it."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name in modules:
        weight: Any = network.get_submodule(name).weight
        out, *inner = weight.shape
        ones = (1,) * (len(inner) - 1)
        down = torch.randn(rank, *inner, generator=rng) * 0.2
        made[name] = (down, torch.randn(out, rank, *ones, generator=rng) * 0.1)
    return made


def peft(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str) -> State:
    """diffusers' keys: unet.….lora_A.weight."""
    return keyed(pairs, f"{prefix}.{{}}.lora_A.weight", f"{prefix}.{{}}.lora_B.weight")


def kohya(
    pairs: dict[str, tuple[Tensor, Tensor]], prefix: str, alpha: float | None = None
) -> State:
    """kohya's keys: lora_unet_….lora_down.weight and .alpha."""
    state = {}
    for name, (down, up) in pairs.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def keyed(pairs: dict[str, tuple[Tensor, Tensor]], down: str, up: str) -> State:
    return {
        k: v
        for name, (a, b) in pairs.items()
        for k, v in ((down.format(name), a), (up.format(name), b))
    }


def by_ldm(network: Any, pairs: dict[str, Any]) -> dict[str, Any]:
    """The same pairs by LDM's names."""
    names = ldm_names(pairs, network.config)
    return {names[k]: v for k, v in pairs.items()}


def save(
    state: State, path: Path, settings: dict[str, Any] | None = None, rank: str = "unet"
) -> Path:
    """Write a file; `settings` are PEFT's, as diffusers keeps them in the header."""
    header = {"format": "pt"}
    if settings is not None:
        header["lora_adapter_metadata"] = json.dumps(
            {f"{rank}.{k}": v for k, v in settings.items()}
        )
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path, header)
    return path


# ---- the original code's layers of FLUX's and SD 3's first blocks, and the modules they are here

Q = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE, ONE = "transformer_blocks.0.", "single_transformer_blocks.1."
BFL = {
    "double_blocks.0.img_attn.qkv": [DOUBLE + m for m in Q],
    "double_blocks.0.txt_attn.qkv": [DOUBLE + m for m in ADDED],
    "double_blocks.0.img_attn.proj": [DOUBLE + "attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": [DOUBLE + "attn.to_add_out"],
    "double_blocks.0.img_mlp.0": [DOUBLE + "ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": [DOUBLE + "ff_context.net.2"],
    "double_blocks.0.img_mod.lin": [DOUBLE + "norm1.linear"],
    "double_blocks.0.txt_mod.lin": [DOUBLE + "norm1_context.linear"],
    "single_blocks.1.linear1": [ONE + m for m in (*Q, "proj_mlp")],
    "single_blocks.1.linear2": [ONE + "proj_out"],
    "single_blocks.1.modulation.lin": [ONE + "norm.linear"],
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": [DOUBLE + m for m in Q],
    "double_blocks.0.processor.qkv_lora2": [DOUBLE + m for m in ADDED],
    "double_blocks.0.processor.proj_lora1": [DOUBLE + "attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": [DOUBLE + "attn.to_add_out"],
    "single_blocks.1.processor.qkv_lora": [ONE + m for m in Q],
}
SAI = {
    "joint_blocks.0.x_block.attn.qkv": [DOUBLE + m for m in Q],
    "joint_blocks.0.context_block.attn.qkv": [DOUBLE + m for m in ADDED],
    "joint_blocks.0.x_block.attn.proj": [DOUBLE + "attn.to_out.0"],
    "joint_blocks.0.x_block.mlp.fc1": [DOUBLE + "ff.net.0.proj"],
    "joint_blocks.0.context_block.mlp.fc2": [DOUBLE + "ff_context.net.2"],
    "joint_blocks.0.x_block.adaLN_modulation.1": [DOUBLE + "norm1.linear"],
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
}


def joined(
    network: nn.Module, layers: dict[str, list[str]], rank: int = 2
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Factors of layers that are several modules here; and the change that each module gets."""
    rng = torch.Generator().manual_seed(0)
    pairs, changes = {}, {}
    for name, modules in layers.items():
        weights: list[Any] = [network.get_submodule(m).weight for m in modules]
        down = torch.randn(rank, *weights[0].shape[1:], generator=rng) * 0.2
        ups = [torch.randn(len(w), rank, generator=rng) * 0.1 for w in weights]
        ones = (1,) * (down.ndim - 2)
        pairs[name] = (down, torch.cat(ups).view(-1, rank, *ones))
        for module, up, weight in zip(modules, ups, weights, strict=True):
            changes[module] = (up @ down.flatten(1)).view(weight.shape)
    return pairs, changes


def layers_of(network: nn.Module, pattern: str) -> list[str]:
    """The names of a network's layers that a regex matches whole."""
    return [
        k for k, m in network.named_modules() if re.fullmatch(pattern, k) and hasattr(m, "weight")
    ]


def with_text_model(pairs: dict[str, Any]) -> dict[str, Any]:
    """CLIP's modules by the names that files have."""
    return {f"text_model.{k.removeprefix('text_model.')}": v for k, v in pairs.items()}
