"""A finished adapter as LoRA files: what `load_lora_weights` takes, and what ComfyUI reads."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from students.export.folder import pipeline, request
from students.export.formats import File, State, diffusers_lora, ldm_names, to_kohya, write
from students.export.unquantised import with_file_weights
from students.generator import Generator
from students.lora import AdaptedDenoiser, unwrap
from teachers.catalogue.loading import find
from teachers.errors import UserError
from teachers.families.base import Prompted, quiet
from teachers.families.stable_diffusion import SDXL
from teachers.quantised import is_quantised
from teachers.teacher import EMBEDDED, Teacher

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
KOHYA = "comfyui_lora.safetensors"


def possible(generator: Generator, teacher: Teacher) -> bool:
    """Whether there is a file form: of plain LoRA, for a pipeline that loads LoRA (not all do)."""
    student, codec = generator.denoiser, teacher.codec
    if not isinstance(student, AdaptedDenoiser) or not isinstance(codec, Prompted):
        return False
    from diffusers.loaders.lora_base import LoraBaseMixin

    if not isinstance(codec.pipe, LoraBaseMixin):
        return False
    return type(student.config).__name__ == "LoraConfig" and not student.config.use_dora


def export_lora(
    generator: Generator,
    teacher: Teacher,
    student: Path,
    out: Path,
    failed: Callable[[str, Exception], None] | None = None,
) -> None:
    """Write the adapter's files to `out`, with the scheduler that it was trained for.

    They are drawn with by stock diffusers in another process, on the teacher's own weights at
    strength 1.0, and appear only if the pictures are the student's.

    Args:
        student: The exported, merged student, whose other parts and scheduler are used.
        failed: Is given the name of each file that could not be made, and why; the others are
            written. Without it, the first failure is raised and no file appears.

    Raises:
        ExportError: stock diffusers cannot load a file, or its pictures differ.
    """
    states, _ = forms(generator, teacher)
    files = [File(out / name, state) for name, state in states.items()]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    network = unwrap(generator.denoiser)
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
            exact = with_file_weights(generator, teacher, torch.float32)
        # a copy of the network, beside encoders that left the device long ago
        pipe = pipeline(exact, teacher).to("cpu")

        def draw(some: list[File]) -> None:
            write(some, pipe, base, generator.counts, arguments)

        if failed is None:
            draw(files)
        else:
            each(files, draw, failed)
    shutil.copytree(student / "scheduler", out / "scheduler")


def each(
    files: list[File],
    draw: Callable[[list[File]], None],
    failed: Callable[[str, Exception], None],
) -> None:
    """Write all files at once; where that fails, each by itself, so that none costs another."""
    try:
        draw(files)
    except Exception as error:
        if len(files) == 1:
            failed(files[0].path.name, error)
            return
        for file in files:
            each([file], draw, failed)


def forms(generator: Generator, teacher: Teacher) -> tuple[dict[str, State], dict[str, str]]:
    """The adapter in each file's form, by the file's name; and why there is no other, by its.

    Raises:
        UserError: it is no plain LoRA, and has no file at all.
    """
    adapter = generator.denoiser
    assert isinstance(adapter, AdaptedDenoiser)
    network = unwrap(adapter)
    scale = adapter.config.lora_alpha / adapter.config.r
    state = {k.removeprefix("backbone."): v.detach().cpu() for k, v in adapter.trainable().items()}
    plain = diffusers_lora(state, scale, network.PART)
    if network.PART != "unet":
        return {DIFFUSERS: plain}, {}
    backbone: Any = network.backbone
    modules = [k.removeprefix("unet.").split(".lora_")[0] for k in plain]
    try:
        # SDXL is known by LDM's names, SD 1.x and 2.x by diffusers' own
        names = ldm_names(modules, backbone.config) if isinstance(network, SDXL) else None
        return {DIFFUSERS: plain, KOHYA: to_kohya(plain, names)}, {}
    except UserError as error:  # a UNet whose blocks LDM's has not
        return {DIFFUSERS: plain}, {KOHYA: str(error)}


def rehearse(generator: Generator, teacher: Teacher) -> dict[str, str]:
    """Before training: whether stock diffusers will read the files' names as those of the network.

    Returns:
        Why a file will not be written, by its name.

    Raises:
        UserError: no file will be.
    """
    states, without = forms(generator, teacher)
    kind = type(teacher.codec.pipe)  # pyright: ignore[reportAttributeAccessIssue]
    config = getattr(unwrap(generator.denoiser).backbone, "config", None)
    unet = {"unet_config": config} if KOHYA in states else {}
    for name, state in states.items():
        try:
            with quiet():
                found = kind.lora_state_dict(dict(state), **unet)
        except Exception as error:  # whatever diffusers' converters come to
            raise UserError(f"lora/{name}: diffusers cannot read it ({line(error)})") from None
        read = found[0] if isinstance(found, tuple) else found
        if odd := {newer(key) for key in read} ^ states[DIFFUSERS].keys():
            raise UserError(f"lora/{name}: diffusers reads other layers of it, as {min(odd)}")
    return without


def newer(key: str) -> str:
    """PEFT's name of a weight that diffusers names as it did before it used PEFT, as kohya's."""
    key = re.sub(r"\.processor\.to_out_lora\.", ".to_out.0.lora.", key)
    key = re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", key)
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
