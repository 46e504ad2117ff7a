"""Students trained on quantised weights, moved to the weights in their teacher's files.

An adapter trains on quantised weights but is merged into the original ones. So quantised weights
are never exported, and their rounding is no part of the student.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from students.adapter_layers import adapter_layers, adapter_names
from students.generator import Generator
from students.lora import adapter_of, unwrap, with_schedule
from students.two_time import readings
from teachers.catalogue.loading import find, load
from teachers.errors import UserError, first_line
from teachers.families.base import Pretrained, quiet
from teachers.quantised import Precision, is_quantised
from teachers.storage import packed
from teachers.storage.components import module
from teachers.storage.files import home, read_json
from teachers.storage.variants import reading, variant_of
from teachers.teacher import EMBEDDED, Teacher


def unquantised(generator: Generator, teacher: Teacher) -> Generator:
    """The student merged into its teacher's weights in bfloat16, in host memory.

    A student without quantised weights is returned unchanged.

    Raises:
        UserError: the teacher's files are no longer there.
    """
    if not is_quantised(unwrap(generator.denoiser)):
        return generator
    return with_file_weights(generator, teacher, torch.bfloat16)


def with_file_weights(
    generator: Generator, teacher: Teacher, dtype: torch.dtype, fused: bool = True
) -> Generator:
    """An adapter merged into the weights in its teacher's files, as `dtype` and in host memory.

    Args:
        fused: With the LoRA files of the user that the teacher has in its weights.

    Raises:
        UserError: the teacher's files are no longer there.
    """
    network, adapter = unwrap(generator.denoiser), adapter_of(generator.denoiser)
    assert adapter is not None and adapter.name is not None
    backbone = read_backbone(network, teacher, dtype)
    if fused and teacher.fusion is not None:
        folder = None if is_file(teacher) else folder_of(teacher) / network.PART
        with reading(teacher.options.get("variant")):
            teacher.fusion.apply(network.PART, backbone, folder)
    merge(network.backbone, adapter.name, backbone)
    view = with_schedule(network, network.schedule)
    view.backbone = backbone.requires_grad_(False).eval()
    twin = copy(generator)
    inner: nn.Module = view
    for number in reversed(readings(generator.denoiser)):
        around, embedding = copy(number), deepcopy(number.embedding)
        assert embedding is not None
        around._modules = {"denoiser": inner, "embedding": embedding.cpu()}
        inner = around
    twin._modules = {"denoiser": inner}
    return twin


def read_backbone(network: Pretrained, teacher: Teacher, dtype: torch.dtype) -> nn.Module:
    """The teacher's backbone, read again from its files.

    Raises:
        UserError: they cannot be read.
    """
    kind: Any = type(network.backbone)
    names: dict[Precision, torch.dtype] = {
        "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
    }  # fmt: skip
    precision: Precision = next(k for k, v in names.items() if v is dtype)
    try:
        if is_file(teacher):
            return unwrap(plain(teacher, precision).denoiser).backbone
        with reading(teacher.options.get("variant")):
            folder = folder_of(teacher) / network.PART
            return module(kind, folder, "export", network.PART, torch_dtype=dtype)
    except (OSError, UserError) as error:
        reason = first_line(error).removeprefix("export: ")
        raise UserError(
            f"export: the adapter is merged into the weights of {teacher.source!r}, which cannot "
            f"be read ({reason}); restore them and resume the run"
        ) from None


def is_file(teacher: Teacher) -> bool:
    """Whether a teacher was loaded from a single file."""
    return home(teacher.source, "teacher").is_file()


def plain(teacher: Teacher, precision: Precision) -> Teacher:
    """A teacher read again without the LoRA files in its weights."""
    options = {k: v for k, v in teacher.options.items() if k != "adapters"}
    return load(teacher.source, **{**options, "precision": precision})


def folder_of(teacher: Teacher) -> Path:
    """The pipeline's folder that a teacher was loaded from."""
    with reading(teacher.options.get("variant")):
        return EMBEDDED.get(teacher.source) or find(teacher.source)


def base_path(teacher: Teacher) -> Path:
    """The folder or the single file that a teacher was loaded from."""
    return home(teacher.source, "teacher") if is_file(teacher) else folder_of(teacher)


def is_stock(part: Path) -> bool:
    """Whether stock diffusers reads a component's folder without a word, on every machine."""
    quantised = packed.KEY in read_json(part / "config.json", "export")
    return not quantised and variant_of(p.name for p in part.iterdir()) is None


def base_folder(teacher: Teacher, parts: Iterable[str], scratch: Path) -> Path:
    """A folder with some of a teacher's parts as stock diffusers loads them, without LoRA files.

    Args:
        scratch: Where the parts are written in float32, if they are of a single file or a variant,
            or quantised.
    """
    parts = list(parts)
    if not is_file(teacher):
        folder = folder_of(teacher)
        with reading(teacher.options.get("variant")):
            if all(is_stock(folder / part) for part in parts):
                return folder
    pipe: Any = plain(teacher, "fp32").codec.pipe
    with quiet():
        for part in parts:
            getattr(pipe, part).save_pretrained(scratch / part)
    return scratch


@torch.no_grad()
def merge(quantised: nn.Module, name: str, backbone: nn.Module) -> None:
    """Add an adapter's change to the same layers of another backbone, in place, in float32."""
    adapted = set(adapter_layers(quantised))
    for path, layer in quantised.named_modules():
        if layer in adapted and name in adapter_names(layer):
            change: Any = layer
            weight = backbone.get_submodule(path).weight
            assert isinstance(weight, nn.Parameter)
            delta = change.get_delta_weight(name).float().to(weight.device)
            weight.copy_((weight.float() + delta).to(weight.dtype))
