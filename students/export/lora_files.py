"""A trained adapter as LoRA files, for diffusers' `load_lora_weights` and for ComfyUI."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from students.export.combined import joined, kohya_encoders, to_original, weight_gap
from students.export.folder import SIDECAR, pipeline, request
from students.export.formats import File, State, diffusers_lora, ldm_names, to_kohya, write
from students.export.unquantised import base_folder, base_path, with_file_weights
from students.generator import Generator
from students.lora import AdaptedDenoiser, unwrap
from students.metadata import keys
from students.metadata.turbo import Turbo, describe
from teachers.adapters import original
from teachers.errors import UserError
from teachers.families.base import Pretrained, Prompted, quiet
from teachers.families.stable_diffusion import SDXL, Kolors
from teachers.quantised import is_quantised
from teachers.storage.components import module
from teachers.storage.files import read_json
from teachers.teacher import Teacher

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
COMFYUI = "comfyui_lora.safetensors"  # kohya's keys of UNets, the original code's of transformers
# Of a teacher with LoRA files in its weights, the two files above hold those files as well. These
# are the student's adapter alone.
TURBO = {DIFFUSERS: "turbo_only_lora.safetensors", COMFYUI: "turbo_only_comfyui_lora.safetensors"}


def possible(generator: Generator, teacher: Teacher) -> bool:
    """Whether LoRA files can be written: of plain LoRA on the teacher's own weights, for pipelines
    that load LoRA and for networks that ComfyUI has."""
    student, codec = generator.denoiser, teacher.codec
    if not isinstance(student, AdaptedDenoiser) or not isinstance(codec, Prompted):
        return False
    if unwrap(student).backbone is not unwrap(teacher.denoiser).backbone:
        return False  # it is on the weights of an earlier student
    if not loads_lora(codec.pipe) and not original.places(unwrap(student).backbone):
        return False
    return type(student.config).__name__ == "LoraConfig" and not student.config.use_dora


def loads_lora(pipe: Any) -> bool:
    """Whether a pipeline of diffusers has `load_lora_weights`."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    return isinstance(pipe, LoraBaseMixin)


def by_original(name: str, network: Pretrained) -> bool:
    """Whether a file has the names of a transformer's original code.

    Stock diffusers reads those of some networks only, so the file is compared weight by weight.
    """
    return name in (COMFYUI, TURBO[COMFYUI]) and network.PART != "unet"


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
    strength 1.0; the files appear only if the pictures equal the student's. A file by a
    transformer's original names is read back instead, and its weights are compared with the
    student's. The teacher's own weights are without the LoRA files of `teacher.adapters`: one file
    of each form has these in it, and one is the adapter alone, whose pictures are compared with the
    adapter's on these weights.

    Args:
        student: The folder of the exported student, whose other parts and scheduler are used.
        failed: Called with the name and the error of each file that fails; the others are written.
            None raises the first error, and no file appears.
        licence: The name of the licence that the student inherits, for the files' headers.

    Raises:
        ExportError: stock diffusers cannot load a file, or its pictures differ.
    """
    states, _ = forms(generator, teacher)
    recipe = read_json(student / SIDECAR, f"student {str(student)!r}").get("recipe") or {}
    turbo = describe(generator, teacher, recipe, licence, base_path(teacher))
    network = unwrap(generator.denoiser)
    files = [
        described(out / name, state, turbo, states, by_original(name, network))
        for name, state in states.items()
    ]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for fused in (True, False):
        some = [f for f in files if (f.path.name in TURBO) is fused]
        if some:
            write_on_base(some, generator, teacher, student, fused, failed)
    shutil.copytree(student / "scheduler", out / "scheduler")


def write_on_base(
    files: list[File],
    generator: Generator,
    teacher: Teacher,
    student: Path,
    fused: bool,
    failed: Callable[[str, Exception], None] | None,
) -> None:
    """Write files, once stock diffusers draws from them, on the plain base, what they are.

    Args:
        student, failed: As in `export_lora`.
        fused: Whether the files hold the LoRA files in the teacher's weights, and so are the
            student; otherwise they are its adapter alone.
    """
    network = unwrap(generator.denoiser)
    encoders = set() if teacher.fusion is None else teacher.fusion.parts() - {network.PART}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        base.mkdir()
        source = base_folder(teacher, {network.PART, *encoders}, Path(scratch, "parts"))
        for part in student.iterdir():  # everything else is the student's
            plain = part.name in {network.PART, *encoders}
            (base / part.name).symlink_to((source / part.name if plain else part).resolve())
        _, arguments = request(generator, teacher)
        exact, rounded = generator, next(network.backbone.parameters()).dtype != torch.float32
        if rounded or is_quantised(network) or not fused:
            # stock diffusers adds the file to the weights on the disk, read as float32
            exact = with_file_weights(generator, teacher, torch.float32, fused)
        # the network is a copy, and the encoders are on the CPU already
        pipe = pipeline(exact, teacher).to("cpu")
        if not fused:
            pipe.register_modules(**{k: plain_encoder(pipe, source, k) for k in encoders})
        gap = partial(weight_gap, pipe=pipe, base=base, part=network.PART)
        files = [
            replace(file, gap=gap) if by_original(file.path.name, network) else file
            for file in files
        ]

        def write_checked(some: list[File]) -> None:
            write(some, pipe, base, generator.counts, arguments)

        if failed is None:
            write_checked(files)
        else:
            write_each(files, write_checked, failed)


def plain_encoder(pipe: Any, source: Path, part: str) -> Any:
    """A text encoder without the LoRA files that the teacher's has in its weights."""
    kind = type(getattr(pipe, part))
    return module(kind, source / part, "export", part, torch_dtype=torch.float32).eval()


def described(
    path: Path, state: State, turbo: Turbo, states: dict[str, State], compared: bool = False
) -> File:
    """A LoRA file with its header, its ComfyUI graph and the notes that Forge reads.

    Of two files of one content, ComfyUI maps its own whole; both have the graph of that.

    Args:
        states: All files by name.
        compared: Whether its weights are compared, and not pictures that stock diffusers draws.
    """
    file = COMFYUI
    if path.name in TURBO.values():
        file, turbo = TURBO[COMFYUI], replace(turbo, contains=())
    graph = None
    if file in states:
        encoders = any(k.startswith(("text_encoder", "lora_te")) for k in state)
        graph = turbo.graph(file, lora=True, encoders=encoders)
    header = keys.header(turbo, path.name, graph, lora=True) | keys.lora_fields(state)
    if compared:
        header[keys.VERIFIED] = json.dumps({"of": "weights", "max_abs": keys.UNVERIFIED})
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
    turbo = diffusers_lora(state, scale, network.PART)
    pipe: Any = teacher.codec.pipe
    if teacher.fusion is None:
        return keyed(turbo, network, pipe)
    alone, without = keyed(turbo, network, pipe)
    states = {TURBO[name]: v for name, v in alone.items()}
    without = {TURBO[name]: why for name, why in without.items()}
    try:
        whole, lacking = keyed(joined(turbo, teacher.fusion, pipe, network.PART), network, pipe)
    except UserError as error:
        return states, {**without, DIFFUSERS: str(error)}
    return {**whole, **states}, {**without, **lacking}


def keyed(lora: State, network: Pretrained, pipe: Any) -> tuple[dict[str, State], dict[str, str]]:
    """A diffusers LoRA with the keys of each program, and why one is left out, by file name."""
    states, without = {DIFFUSERS: lora}, {}
    if not loads_lora(pipe):
        states, without = {}, {DIFFUSERS: f"diffusers' {type(pipe).__name__} loads no LoRA"}
    try:
        states[COMFYUI] = for_comfyui(lora, network)
    except UserError as error:
        without[COMFYUI] = str(error)
    return states, without


def for_comfyui(lora: State, network: Pretrained) -> State:
    """A diffusers LoRA with keys all of which ComfyUI maps to its own network.

    Raises:
        UserError: ComfyUI has no such network, or a layer has no name in it.
    """
    if isinstance(network, Kolors):
        raise UserError("LoRA: ComfyUI's core has no Kolors; use diffusers' LoRA")
    backbone: Any = network.backbone
    if network.PART != "unet":
        return to_original(lora, backbone)
    unet = {k: v for k, v in lora.items() if k.startswith("unet.")}
    modules = [k.removeprefix("unet.").split(".lora_")[0] for k in unet]
    sdxl = isinstance(network, SDXL)
    # SDXL is known by LDM's names, SD 1.x and 2.x by diffusers' own
    names = ldm_names(modules, backbone.config) if sdxl else None
    encoders = {k: v for k, v in lora.items() if k not in unet}
    return {**to_kohya(unet, names), **kohya_encoders(encoders, sdxl)}


def rehearse(generator: Generator, teacher: Teacher) -> dict[str, str]:
    """Before training, check that stock diffusers maps the files' keys to the network's layers.

    Files by a transformer's original names are made of the table that reads them.

    Returns:
        By file name, why a file will not be written.

    Raises:
        UserError: a file cannot be read, or its keys are mapped to other layers.
    """
    states, without = forms(generator, teacher)
    turbo = describe(generator, teacher, {})
    for name, state in states.items():
        described(Path(name), state, turbo, states)
    network = unwrap(generator.denoiser)
    kind = type(teacher.codec.pipe)  # pyright: ignore[reportAttributeAccessIssue]
    config = getattr(network.backbone, "config", None)
    unets = any(k.startswith("unet.") for state in states.values() for k in state)
    unet = {"unet_config": config} if unets else {}
    for name, state in states.items():
        if by_original(name, network):
            continue
        try:
            with quiet():
                found = kind.lora_state_dict(dict(state), **unet)
        except Exception as error:  # whatever diffusers' converters come to
            raise UserError(
                f"lora/{name}: diffusers cannot read it ({line(error)}); use student/"
            ) from None
        read = found[0] if isinstance(found, tuple) else found
        plain = DIFFUSERS if name in TURBO else TURBO[DIFFUSERS]
        if odd := {newer(key) for key in read} ^ states[plain].keys():
            raise UserError(
                f"lora/{name}: diffusers reads other layers of it, as {min(odd)}; use student/"
            )
    return without


def newer(key: str) -> str:
    """PEFT's name of a weight that diffusers read from kohya's file under its pre-PEFT name."""
    key = re.sub(r"\.processor\.to_out_lora\.", ".to_out.0.lora.", key)
    key = re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", key)
    key = re.sub(r"\.self_attn\.to_([qkv]|out)_lora\.", r".self_attn.\1_proj.lora.", key)
    key = key.replace(".lora_linear_layer.", ".lora.")
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
