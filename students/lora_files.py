"""A finished adapter as LoRA files: what `load_lora_weights` takes, and what ComfyUI reads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from students.export import pipeline, request
from students.formats import File, diffusers_lora, ldm_names, to_kohya, write
from students.generator import Generator
from students.lora import Adapted, unwrap
from students.restored import reread
from teachers.pipeline import Prompted
from teachers.quantised import is_quantised
from teachers.stable import SDXL
from teachers.teacher import EMBEDDED, Teacher, find

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
KOHYA = "comfyui_lora.safetensors"


def possible(generator: Generator, teacher: Teacher) -> bool:
    """Whether there is a file form: of plain LoRA, for a pipeline that loads LoRA (not all do)."""
    student, codec = generator.denoiser, teacher.codec
    if not isinstance(student, Adapted) or not isinstance(codec, Prompted):
        return False
    from diffusers.loaders.lora_base import LoraBaseMixin

    if not isinstance(codec.pipe, LoraBaseMixin):
        return False
    return type(student.config).__name__ == "LoraConfig" and not student.config.use_dora


def export_lora(generator: Generator, teacher: Teacher, student: Path, out: Path) -> None:
    """Write the adapter's files to `out`, with the scheduler that it was trained for.

    They are drawn with by stock diffusers in another process, on the teacher's own weights at
    strength 1.0, and appear only if the pictures are the student's.

    Args:
        student: The exported, merged student, whose other parts and scheduler are used.

    Raises:
        ExportError: stock diffusers cannot load a file, or its pictures differ.
    """
    adapter = generator.denoiser
    assert isinstance(adapter, Adapted)
    network = unwrap(adapter)
    scale = adapter.config.lora_alpha / adapter.config.r
    state = {k.removeprefix("backbone."): v.detach().cpu() for k, v in adapter.trainable().items()}
    plain = diffusers_lora(state, scale, network.PART)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = [File(out / DIFFUSERS, plain)]
    if network.PART == "unet":
        backbone: Any = network.backbone
        modules = [k.removeprefix("unet.").split(".lora_")[0] for k in plain]
        # SDXL is known by LDM's names, SD 1.x and 2.x by diffusers' own
        names = ldm_names(modules, backbone.config) if isinstance(network, SDXL) else None
        files.append(File(out / KOHYA, to_kohya(plain, names)))
    source = EMBEDDED.get(teacher.source) or find(teacher.source)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for part in student.iterdir():  # all as the student has it, but for the network
            (base / part.name).symlink_to(part.resolve())
        (base / network.PART).unlink()
        (base / network.PART).symlink_to((source / network.PART).resolve())
        _, arguments = request(generator, teacher)
        exact = generator
        if next(network.backbone.parameters()).dtype != torch.float32 or is_quantised(network):
            # stock diffusers adds the file to the weights as they are on the disk, in float32
            exact = reread(generator, teacher, torch.float32)
        # a copy of the network, beside encoders that left the device long ago
        merged = pipeline(exact, teacher).to("cpu")
        write(files, merged, base, generator.counts, arguments)
    shutil.copytree(student / "scheduler", out / "scheduler")
