"""A finished student as one file: Stable Diffusion 1.x and SDXL, by the names of LDM's programs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from students.export.folder import SIDECAR, load_student, pipeline, request
from students.export.formats import File, single_file, write
from students.generator import Generator
from students.lora import unwrap
from students.metadata import keys
from students.metadata.turbo import Turbo, base_of, describe
from students.scale_reading import GuidedStudent, pipeline_scale
from teachers.errors import UserError
from teachers.families.stable_diffusion import scale_embedding
from teachers.storage.files import home, read_json
from teachers.teacher import EMBEDDED, Teacher


def export_single(student: Path, out: Path, licence: Callable[[str], str] = lambda _: "") -> None:
    """Write a student's whole pipeline to one safetensors file.

    Stock diffusers draws the student's pictures from it in another process, unguided and with the
    student's scheduler, before it appears under its name.

    Args:
        student: An exported student, or the folder of its run.
        licence: The name of the licence that students of a teacher inherit, by the teacher's
            source; for the file's header.

    Raises:
        UserError: the student is of another family, which has no such file.
        ExportError: the pictures differ.
    """
    generator, teacher = load_student(student)
    if isinstance(generator.denoiser, GuidedStudent):
        raise UserError(
            f"{student}: its pipeline guides it, and single files are for unguided students; use "
            "the diffusers folder"
        )
    pipe = pipeline(generator, teacher)
    if unwrap(generator.denoiser).PART == "unet":
        forget_scale(pipe.unet, student, pipeline_scale(generator.denoiser))
    state = single_file(pipe)
    _, arguments = request(generator, teacher)
    folder = student / "student" if (student / "student").is_dir() else student
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for part in folder.iterdir():  # all as the student has it, but for the network's config
            if part.name != "unet":
                (base / part.name).symlink_to(part.resolve())
        pipe.unet.save_config(base / "unet")
        described = metadata_of(student, folder, generator, teacher, licence)
        graph = described.graph(out.name, lora=False)
        header = keys.header(described, out.name, graph, lora=False)
        beside = {f"{out.stem}.comfyui.json": keys.graph_file(graph)} if graph else {}
        file = File(out, state, whole=True, metadata=header, beside=beside)
        write([file], pipe, base, generator.counts, {**arguments, "guidance_scale": 1.0})


def metadata_of(
    student: Path,
    folder: Path,
    generator: Generator,
    teacher: Teacher,
    licence: Callable[[str], str],
) -> Turbo:
    """The facts of an exported student, whose base is the teacher that it was distilled from.

    Args:
        student, licence: As in `export_single`.
        folder: The exported student's folder.
        teacher: That folder as a teacher.
    """
    about = read_json(folder / SIDECAR, f"student {str(student)!r}")
    source = str(about.get("teacher") or teacher.source)
    described = describe(generator, teacher, about.get("recipe") or {}, licence(source))
    base = base_of(unwrap(generator.denoiser), source, on_disk(source))
    return replace(described, base=base, contains=tuple(about.get("adapters") or ()))


def on_disk(source: str) -> Path | None:
    """A teacher's folder or single file, if this machine has it; nothing is downloaded."""
    if source in EMBEDDED:
        return EMBEDDED[source]
    if (path := home(source, "teacher")).exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception:  # not in the cache, or no Hub id
        return None


@torch.no_grad()
def forget_scale(unet: Any, student: Path, scale: float | None = None) -> None:
    """Take out the layer by which exported students are told of a guidance scale: LDM's networks
    have none. What it adds at one scale becomes part of a bias.

    Args:
        scale: The one that the student is sampled at; None if it reads none, so that the layer is
            of zeros.

    Raises:
        UserError: the layer is not of zeros, and there is no scale to keep.
    """
    embedding = unet.time_embedding
    layer = embedding.cond_proj
    if layer is not None and layer.weight.any():
        if scale is None:
            raise UserError(
                f"{student}: its network reads the guidance scale (time_embedding.cond_proj), "
                "which no single file holds; use the diffusers folder"
            )
        weight = layer.weight
        read = scale_embedding(torch.tensor([scale], device=weight.device), weight.shape[1])
        first = embedding.linear_1
        first.bias += first.weight @ layer(read.to(weight))[0]
    unet.time_embedding.cond_proj = None
    unet.register_to_config(time_cond_proj_dim=None)
