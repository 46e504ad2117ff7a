"""One LoRA of several: of a student's adapter and its teacher's LoRA files, and of several layers.

The sum of changes B₁A₁ + B₂A₂ is the product of [B₁ | B₂] and [A₁; A₂], whose rank is the sum of
the ranks. So the joined file is exact, and on the plain base it is the student.

ComfyUI keeps the layers of a transformer's original code, where query, key and value may be one
layer. Its change has their A below one another, and their B on a diagonal, which is exact as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from students.export.folder import ExportError
from students.export.formats import State, parts
from teachers.adapters import original
from teachers.adapters.files import read
from teachers.adapters.fuse import Fusion, stored
from teachers.errors import UserError

Factors = tuple[Tensor, Tensor]  # A (rank, in, …) and B (out, rank, …)
ROUNDING = 1e-5  # the largest difference of a weight, of one that is at most 1
ABSENT = ("SanaTransformer2DModel",)  # networks that ComfyUI's core does not have


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
        if part != network and part not in getattr(pipe, "_lora_loadable_modules", ()):
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


def to_original(lora: Mapping[str, Tensor], network: nn.Module) -> State:
    """A transformer's diffusers LoRA by the layers of its original code, which ComfyUI reads.

    The keys are `diffusion_model.….lora_A.weight`, without alphas, so that the scale is 1. Those of
    text encoders stay diffusers' own.

    Args:
        network: The transformer, with or without adapters.

    Raises:
        UserError: ComfyUI has no such network, or no such layer.
    """
    kind = type(network).__name__
    encoders = {k: v for k, v in lora.items() if k.startswith("text_encoder")}
    layers: dict[str, dict[str, Tensor]] = {}
    for key in lora.keys() - encoders.keys():
        path, side = parts(key)
        layers.setdefault(path.partition(".")[2], {})[side] = lora[key]
    factors: dict[str, Factors] = {k: (v["A"], v["B"]) for k, v in layers.items()}
    if kind in ABSENT:
        raise UserError(f"LoRA: ComfyUI's core has no {kind}; use diffusers' LoRA")
    made: State = {}
    for name, place in original.places(network).items():
        here = {m: factors.pop(m) for m in place.modules if m in factors}
        if not here:
            continue
        down, up = _stacked(place.modules, here, network)
        up = torch.cat([*reversed(up.chunk(2))]) if place.swapped else up
        made[f"diffusion_model.{name}.lora_A.weight"] = down
        made[f"diffusion_model.{name}.lora_B.weight"] = up
    if factors:
        raise UserError(
            f"LoRA: no name of {kind}'s {min(factors)!r} in ComfyUI is known; use diffusers' LoRA"
        )
    return made | encoders


def _stacked(modules: tuple[str, ...], factors: dict[str, Factors], network: nn.Module) -> Factors:
    """The factors of modules whose outputs are the rows of one layer; a zero change is left out."""
    if len(modules) == 1:
        return factors[modules[0]]
    layers: list[Any] = [network.get_submodule(m) for m in modules]
    ranks = [len(factors[m][0]) if m in factors else 0 for m in modules]
    some = [*factors.values()]
    up = some[0][1].new_zeros(sum(layer.out_features for layer in layers), sum(ranks))
    row = column = 0
    for module, layer, rank in zip(modules, layers, ranks, strict=True):
        if rank:
            up[row : row + layer.out_features, column : column + rank] = factors[module][1]
        row, column = row + layer.out_features, column + rank
    return torch.cat([factors[m][0] for m in modules if m in factors]), up


def weight_gap(file: Path, pipe: Any, base: Path, part: str) -> float:
    """The largest difference between a student's weights and its base's with a LoRA file.

    The file is read as one of `teacher.adapters`. All weights are compared, so a layer that the
    file lacks is a difference.

    Args:
        pipe: The student's pipeline.
        base: The folder of the plain base.
        part: The component that is the network.

    Raises:
        ExportError: the file does not fit, or a weight differs by more than rounding.
    """
    network: nn.Module = getattr(pipe, part)
    networks = {k: m for k, m in pipe.components.items() if k == part or k.startswith("text_enc")}
    networks = {k: m for k, m in networks.items() if isinstance(m, nn.Module)}
    try:
        lora = read(file, file.name, 1.0, part, networks)
    except UserError as error:
        raise ExportError(str(error)) from None
    changes = Fusion((lora,)).changes(part)
    weights, gap = network.state_dict(), 0.0
    for name, path in stored(base / part).items():
        with safe_open(path, "pt") as opened:
            expected = opened.get_tensor(name).float()
        for pair in changes.get(name.removesuffix(".weight"), ()) if name[-7:] == ".weight" else ():
            expected = expected + pair.delta()
        most = float((weights[name].float() - expected).abs().max())
        if not most <= ROUNDING * max(1.0, float(expected.abs().max())):
            raise ExportError(
                f"{file.name}: {name} with it differs from the student's by {most:.2g}"
            )
        gap = max(gap, most)
    return gap
