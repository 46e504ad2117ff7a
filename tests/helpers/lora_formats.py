"""LoRA files with random factors, in the key format of each origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from teachers.adapters.ldm import ldm_names

State = dict[str, Tensor]
LINEAR = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2)"


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
        header["lora_adapter_metadata"] = json.dumps({f"{rank}.{k}": v for k, v in settings.items()})
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path, header)
    return path
