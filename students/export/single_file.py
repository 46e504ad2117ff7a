"""A finished student as one file: Stable Diffusion 1.x and SDXL, by the names of LDM's programs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from students.export.folder import load_student, pipeline, request
from students.export.formats import File, single_file, write
from students.lora import unwrap
from teachers.errors import UserError


def export_single(student: Path, out: Path) -> None:
    """Write a student's whole pipeline to one safetensors file.

    Stock diffusers draws the student's pictures from it in another process, unguided and with the
    student's scheduler, before it appears under its name.

    Args:
        student: An exported student, or the folder of its run.

    Raises:
        UserError: the student is of another family, which has no such file.
        ExportError: the pictures differ.
    """
    generator, teacher = load_student(student)
    pipe = pipeline(generator, teacher)
    if unwrap(generator.denoiser).PART == "unet":
        forget_scale(pipe.unet, student)
    state = single_file(pipe)
    _, arguments = request(generator, teacher)
    folder = student / "student" if (student / "student").is_dir() else student
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        for part in folder.iterdir():  # all as the student has it, but for the network's config
            if part.name != "unet":
                (base / part.name).symlink_to(part.resolve())
        pipe.unet.save_config(base / "unet")
        file = File(out, state, whole=True)
        write([file], pipe, base, generator.counts, {**arguments, "guidance_scale": 1.0})


def forget_scale(unet: Any, student: Path) -> None:
    """Take out the layer of zeros by which exported students are told of a guidance scale: LDM's
    networks have none.

    Raises:
        UserError: it is not of zeros, so that the network really reads the scale.
    """
    layer = unet.time_embedding.cond_proj
    if layer is not None and layer.weight.any():
        raise UserError(
            f"{student}: its network reads the guidance scale (time_embedding.cond_proj), which no "
            "single file holds; use the diffusers folder"
        )
    unet.time_embedding.cond_proj = None
    unet.register_to_config(time_cond_proj_dim=None)
