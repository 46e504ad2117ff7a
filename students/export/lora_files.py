"""A trained adapter as LoRA files, for diffusers' `load_lora_weights` and for ComfyUI."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from students.export.folder import SIDECAR, pipeline, request
from students.export.formats import File, State, diffusers_lora, ldm_names, to_kohya, to_wan, write
from students.export.unquantised import with_file_weights
from students.generator import Generator
from students.lora import AdaptedDenoiser, unwrap
from students.metadata import keys
from students.metadata.turbo import Turbo, describe
from teachers.catalogue.loading import find
from teachers.errors import UserError
from teachers.families.base import Prompted, quiet
from teachers.families.stable_diffusion import SDXL
from teachers.families.wan import Wan
from teachers.quantised import is_quantised
from teachers.storage.files import read_json
from teachers.teacher import EMBEDDED, Teacher

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
KOHYA = COMFYUI = "comfyui_lora.safetensors"  # a UNet's has kohya's keys


def possible(generator: Generator, teacher: Teacher) -> bool:
    """Whether LoRA files can be written: of plain LoRA, for pipelines that load LoRA."""
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
    licence: str = "",
) -> None:
    """Write the adapter's files to `out`, with the scheduler that it was trained for.

    Stock diffusers samples with each file in another process, on the teacher's own weights at
    strength 1.0; the files appear only if the pictures equal the student's.

    Args:
        student: The folder of the exported student, whose other parts and scheduler are used.
        failed: Called with the name and the error of each file that fails; the others are written.
            None raises the first error, and no file appears.
        licence: The name of the licence that the student inherits, for the files' headers.

    Raises:
        ExportError: stock diffusers cannot load a file, or its pictures differ.
    """
    states, _ = forms(generator, teacher)
    network = unwrap(generator.denoiser)
    source = EMBEDDED.get(teacher.source) or find(teacher.source)
    recipe = read_json(student / SIDECAR, f"student {str(student)!r}").get("recipe") or {}
    turbo = describe(generator, teacher, recipe, licence, source)
    files = [described(out / name, state, turbo, states) for name, state in states.items()]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for part in student.iterdir():  # everything but the network is the student's
            (base / part.name).symlink_to(part.resolve())
        (base / network.PART).unlink()
        (base / network.PART).symlink_to((source / network.PART).resolve())
        _, arguments = request(generator, teacher)
        exact = generator
        if next(network.backbone.parameters()).dtype != torch.float32 or is_quantised(network):
            # stock diffusers adds the file to the weights on the disk, read as float32
            exact = with_file_weights(generator, teacher, torch.float32)
        # the network is a copy, and the encoders are on the CPU already
        pipe = pipeline(exact, teacher).to("cpu")

        def write_checked(some: list[File]) -> None:
            write(some, pipe, base, generator.counts, arguments)

        if failed is None:
            write_checked(files)
        else:
            write_each(files, write_checked, failed)
    shutil.copytree(student / "scheduler", out / "scheduler")


def described(path: Path, state: State, turbo: Turbo, states: dict[str, State]) -> File:
    """A LoRA file with its header, its ComfyUI graph and the notes that Forge reads.

    Where there are two files, ComfyUI maps the whole of its own only; both have the graph of that.
    """
    own = turbo.family in ("StableDiffusion", "SDXL", "Wan")
    graph = None
    if COMFYUI in states or not own:
        graph = turbo.graph(COMFYUI if own else DIFFUSERS, lora=True)
    header = keys.header(turbo, path.name, graph, lora=True) | keys.lora_fields(state)
    beside = {f"{path.stem}.json": keys.forge_notes(turbo)}
    if graph is not None:
        beside[f"{path.stem}.comfyui.json"] = keys.graph_file(graph)
    return File(path, state, metadata=header, beside=beside)


def write_each(
    files: list[File],
    write_checked: Callable[[list[File]], None],
    failed: Callable[[str, Exception], None],
) -> None:
    """Write all files at once; if that fails, one by one, so that an error stops one file only."""
    try:
        write_checked(files)
    except Exception as error:
        if len(files) == 1:
            failed(files[0].path.name, error)
            return
        for file in files:
            write_each([file], write_checked, failed)


def forms(generator: Generator, teacher: Teacher) -> tuple[dict[str, State], dict[str, str]]:
    """The adapter's tensors by file name; and by file name, why a file is not written.

    Raises:
        UserError: it is no plain LoRA, and has no file at all.
    """
    adapter = generator.denoiser
    assert isinstance(adapter, AdaptedDenoiser)
    network = unwrap(adapter)
    scale = adapter.config.lora_alpha / adapter.config.r
    state = {k.removeprefix("backbone."): v.detach().cpu() for k, v in adapter.trainable().items()}
    plain = diffusers_lora(state, scale, network.PART)
    if isinstance(network, Wan):
        try:
            return {DIFFUSERS: plain, COMFYUI: to_wan(plain)}, {}
        except UserError as error:
            return {DIFFUSERS: plain}, {COMFYUI: str(error)}
    if network.PART != "unet":
        return {DIFFUSERS: plain}, {}
    backbone: Any = network.backbone
    modules = [k.removeprefix("unet.").split(".lora_")[0] for k in plain]
    try:
        # SDXL is known by LDM's names, SD 1.x and 2.x by diffusers' own
        names = ldm_names(modules, backbone.config) if isinstance(network, SDXL) else None
        return {DIFFUSERS: plain, KOHYA: to_kohya(plain, names)}, {}
    except UserError as error:  # the UNet has blocks that LDM's lacks
        return {DIFFUSERS: plain}, {KOHYA: str(error)}


def rehearse(generator: Generator, teacher: Teacher) -> dict[str, str]:
    """Before training, check that stock diffusers maps the files' keys to the network's layers.

    Returns:
        By file name, why a file will not be written.

    Raises:
        UserError: a file cannot be read, or its keys are mapped to other layers.
    """
    states, without = forms(generator, teacher)
    turbo = describe(generator, teacher, {})
    for name, state in states.items():
        described(Path(name), state, turbo, states)
    kind = type(teacher.codec.pipe)  # pyright: ignore[reportAttributeAccessIssue]
    config = getattr(unwrap(generator.denoiser).backbone, "config", None)
    unet = {"unet_config": config} if any(k.startswith("unet.") for k in states[DIFFUSERS]) else {}
    for name, state in states.items():
        try:
            with quiet():
                found = kind.lora_state_dict(dict(state), **unet)
        except Exception as error:  # whatever diffusers' converters come to
            raise UserError(
                f"lora/{name}: diffusers cannot read it ({line(error)}); use student/"
            ) from None
        read = found[0] if isinstance(found, tuple) else found
        if odd := {newer(key) for key in read} ^ states[DIFFUSERS].keys():
            raise UserError(
                f"lora/{name}: diffusers reads other layers of it, as {min(odd)}; use student/"
            )
    return without


def newer(key: str) -> str:
    """PEFT's name of a weight that diffusers read from kohya's file under its pre-PEFT name."""
    key = re.sub(r"\.processor\.to_out_lora\.", ".to_out.0.lora.", key)
    key = re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", key)
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
