"""The networks of FLUX.1 and SD 3 in single files, by the names of their original code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from teachers.errors import UserError, clipped, first_line
from teachers.storage import bfl, gguf_files, packed
from teachers.storage.components import more

PREFIX = bfl.PREFIX
OTHERS = ("first_stage_model.", "vae.", "text_encoders.")  # beginnings of other parts' names


def network(file: Path, dtype: torch.dtype, who: str) -> dict[str, Tensor] | None:
    """The weights of the network in a file, under diffusers' names.

    None for a safetensors file without original names, which diffusers reads by itself.

    Args:
        dtype: Of quantised weights, which are decoded.

    Raises:
        UserError: one is missing, or is of another network.
    """
    kind, weights = opened(file, dtype, who)
    if kind is None:
        bare = {k.removeprefix(PREFIX): v for k, v in weights.items()}
        return bare or None
    try:
        if any(map(packed.is_scale, weights)):
            weights = packed.decoded(weights, dtype)
        ours, unknown = flux(weights) if kind == "FLUX.1" else sd3(weights)
    except KeyError as error:
        raise UserError(
            f"{who}: the weights in {file} are not whole: {error} is missing; copy it again"
        ) from None
    except (ValueError, TypeError, IndexError, RuntimeError) as error:  # of wrong shapes and forms
        raise UserError(
            f"{who}: the weights in {file} are damaged ({clipped(first_line(error))}); copy it "
            "again"
        ) from None
    if whole := sorted(k for k, v in ours.items() if not v.is_floating_point()):
        raise UserError(
            f"{who}: {file} holds quantised weights without their scales ({whole[0]}"
            f"{more(whole)}); give a file in fp32, bf16, fp16 or fp8"
        )
    if unknown:
        raise UserError(
            f"{who}: {file} holds {clipped(unknown[0])}{more(unknown)}, which {kind}'s network "
            f"does not have; give a file of {kind}"
        )
    return ours


def opened(file: Path, dtype: torch.dtype, who: str) -> tuple[str | None, dict[str, Tensor]]:
    """Whose names a file's network has, and its weights; of GGUF alone under diffusers' names."""
    if file.suffix == gguf_files.SUFFIX:
        weights = gguf_files.read(file, dtype, who)
        return kind_of(list(weights)), weights
    with safe_open(file, "pt") as content:
        mine = own(content.keys())
        kind = kind_of(mine)
        return kind, {} if kind is None else {k: content.get_tensor(k) for k in mine}


def own(names: Iterable[str]) -> list[str]:
    """The names of a file that are its network's, and not an encoder's or the autoencoder's."""
    names = list(names)
    if any(name.startswith(PREFIX) for name in names):
        return [name for name in names if name.startswith(PREFIX)]
    return [name for name in names if not name.startswith(OTHERS)]


def kind_of(names: list[str]) -> str | None:
    """Whose original names these are."""
    if bfl.holds(names):
        return "FLUX.1"
    joint = any(name.removeprefix(PREFIX).startswith("joint_blocks.") for name in names)
    return "SD 3" if joint else None


def flux(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """FLUX.1's weights under diffusers' names, and names that it does not have."""
    if unknown := [name for name in weights if not bfl.places(name)]:
        return {}, unknown
    return bfl.ours(weights), []


def sd3(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The same of SD 3, by diffusers' converter, which takes what it knows out of the mapping."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    left = {k.removeprefix(PREFIX): v for k, v in weights.items()}
    ours = convert_sd3_transformer_checkpoint_to_diffusers(left)
    return ours, sorted(left)
