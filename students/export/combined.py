"""One LoRA of several: a student's adapter and the LoRA files in its teacher's weights, joined.

The sum of changes B₁A₁ + B₂A₂ is the product of [B₁ | B₂] and [A₁; A₂], whose rank is the sum of
the ranks. So the joined file is exact, and on the plain base it is the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from students.export.formats import State, parts
from teachers.adapters.fuse import Fusion
from teachers.errors import UserError


def joined(turbo: Mapping[str, Tensor], fusion: Fusion, pipe: Any, network: str) -> State:
    """The student's LoRA and the teacher's files as one LoRA with diffusers' keys.

    Within a component all ranks are equal, filled up with zeros: loaders of diffusers before 0.42
    read one alpha for all layers from a file without alphas.

    Args:
        turbo: The student's adapter, as `diffusers_lora` makes it.
        pipe: The teacher's pipeline.
        network: Its component that is the denoiser.

    Raises:
        UserError: a file changes a component for which the pipeline loads no LoRA.
    """
    state: State = {}
    for part in sorted({network, *fusion.parts()}):
        if part not in pipe._lora_loadable_modules:
            raise UserError(
                f"LoRA: {type(pipe).__name__} loads no LoRA for its {part}, which teacher.adapters "
                "change; use the diffusers folder"
            )
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for module, changes in fusion.changes(part).items():
            name = f"{part}.{_name(getattr(pipe, part), module, part == network)}"
            pairs[name] = [(c.down.float(), c.up.float() * c.scale) for c in changes]
        if part == network:
            for name in sorted({parts(key)[0] for key in turbo}):
                a, b = (turbo[f"{name}.lora_{k}.weight"].float().cpu() for k in "AB")
                pairs.setdefault(name, []).append((a, b))
        rank = max(sum(len(a) for a, _ in some) for some in pairs.values())
        for name, some in pairs.items():
            a = filled(torch.cat([a for a, _ in some]), 0, rank)
            b = filled(torch.cat([b for _, b in some], 1), 1, rank)
            state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return state


def _name(network: nn.Module, module: str, denoiser: bool) -> str:
    """A module's name in files: CLIP's begins with text_model, which transformers 5 leaves off."""
    if denoiser or not type(network).__name__.startswith("CLIP"):
        return module
    return f"text_model.{module.removeprefix('text_model.')}"


def filled(factor: Tensor, dim: int, rank: int) -> Tensor:
    """A factor with zeros up to a rank along a dimension."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def kohya_encoders(lora: Mapping[str, Tensor], several: bool) -> State:
    """Text encoders' layers of a diffusers LoRA, with kohya's keys.

    Args:
        several: Whether the pipeline has two text encoders, which kohya numbers.
    """
    made: State = {}
    for key, value in lora.items():
        path, kind = parts(key)
        part, _, module = path.partition(".")
        number = "2" if part == "text_encoder_2" else "1" if several else ""
        name = f"lora_te{number}_{module.replace('.', '_')}"
        made[f"{name}.lora_{'down' if kind == 'A' else 'up'}.weight"] = value
        if kind == "A":
            made[f"{name}.alpha"] = torch.tensor(float(len(value)))
    return made
