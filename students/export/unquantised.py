"""Students trained on quantised weights, given back the weights as the teacher's files have them.

An adapter learns on codes, but is merged into what they stand for: quantised weights are never
exported, and no rounding of theirs is frozen into the student.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn

from students.generator import Generator
from students.lora import Adapted, adapters, layers, under, unwrap
from teachers.catalogue.loading import find
from teachers.errors import UserError
from teachers.families.base import Pretrained
from teachers.quantised import is_quantised
from teachers.storage.components import module
from teachers.teacher import EMBEDDED, Teacher
from teachers.text import first_line


def unquantised(generator: Generator, teacher: Teacher) -> Generator:
    """The student as a network of its own, in its teacher's bf16 weights and in host memory.

    A student whose teacher was never quantised is returned as it is.

    Raises:
        UserError: the teacher's files are no longer there.
    """
    if not is_quantised(unwrap(generator.denoiser)):
        return generator
    return reread(generator, teacher, torch.bfloat16)


def reread(generator: Generator, teacher: Teacher, dtype: torch.dtype) -> Generator:
    """An adapter's student as a network of its own: the weights in its teacher's files, as `dtype`
    and in host memory, with the adapter merged.

    Raises:
        UserError: the teacher's files are no longer there.
    """
    network, adapter = unwrap(generator.denoiser), generator.denoiser
    assert isinstance(adapter, Adapted) and adapter.name is not None
    backbone = original(network, teacher, dtype)
    merge(network.backbone, adapter.name, backbone)
    view = under(network, network.schedule)
    view.backbone = backbone.requires_grad_(False).eval()
    twin = copy(generator)
    twin._modules = {"denoiser": view}
    return twin


def original(network: Pretrained, teacher: Teacher, dtype: torch.dtype) -> nn.Module:
    """The teacher's network, read once more from its files."""
    folder = EMBEDDED.get(teacher.source) or find(teacher.source)
    kind: Any = type(network.backbone)
    try:
        return module(kind, folder / network.PART, "export", network.PART, torch_dtype=dtype)
    except (OSError, UserError) as error:
        reason = first_line(error).removeprefix("export: ")
        raise UserError(
            f"export: the adapter belongs on the weights of {teacher.source!r}, which cannot be "
            f"read again ({reason}); put them back and resume the run"
        ) from None


@torch.no_grad()
def merge(quantised: nn.Module, name: str, backbone: nn.Module) -> None:
    """Add an adapter's change to the same layers of another network, worked out in float32."""
    adapted = set(layers(quantised))
    for path, layer in quantised.named_modules():
        if layer in adapted and name in adapters(layer):
            change: Any = layer
            weight = backbone.get_submodule(path).weight
            assert isinstance(weight, nn.Parameter)
            delta = change.get_delta_weight(name).float().to(weight.device)
            weight.copy_((weight.float() + delta).to(weight.dtype))
