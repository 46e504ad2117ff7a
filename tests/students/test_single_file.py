"""Students as single files: what stock diffusers draws from them, and what is refused."""

import re

import pytest
import torch
from safetensors import safe_open

from distill import __main__ as cli
from students import schedulers
from students.export.folder import export
from students.export.single_file import export_single, forget_scale
from students.scale_reading import scale_reading
from teachers import load
from tests.helpers import families
from tests.helpers.formats import PIPELINES
from tests.helpers.refusals import refused


@pytest.mark.slow  # each starts two other processes
@pytest.mark.parametrize("name", PIPELINES)
def test_stock_diffusers_draws_an_exported_students_pictures_from_one_file(name, tmp_path):
    """Single files of SD and SDXL students, drawn by stock diffusers in another process."""
    PIPELINES[name](tmp_path / "scratch").save_pretrained(tmp_path / "teacher")
    teacher = load(str(tmp_path / "teacher"))
    student = schedulers.student(teacher, 2).eval()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    export(student, teacher, tmp_path / "student", {})
    export_single(tmp_path / "student", tmp_path / "one.safetensors")  # compares
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.diffusion_model.input_blocks.0.0.weight" in names
    assert not [n for n in names if "cond_proj" in n]


def test_a_network_that_reads_the_guidance_scale_has_no_single_file(tmp_path):
    teacher = load(str(families.build("sd", tmp_path / "teacher")))
    unet = teacher.denoiser.backbone
    type(teacher.denoiser).unguided(unet)
    forget_scale(unet, tmp_path)  # a layer of zeros changes nothing
    assert unet.config.time_cond_proj_dim is None and unet.time_embedding.cond_proj is None
    type(teacher.denoiser).unguided(unet)
    torch.nn.init.ones_(unet.time_embedding.cond_proj.weight)
    with refused("*", "guidance"):
        forget_scale(unet, tmp_path)


def test_a_student_that_reads_scales_keeps_the_one_of_its_samples(tmp_path):
    teacher = load("shapes")
    student = scale_reading(schedulers.student(teacher, 2), (1.0, 5.0), 2.0).eval()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    export(student, teacher, tmp_path / "student", {})
    export_single(tmp_path / "student", tmp_path / "one.safetensors")  # compares pixels
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert not [n for n in file.keys() if "cond_proj" in n]  # noqa: SIM118


def test_a_single_file_is_named_as_one_and_replaces_nothing(tmp_path):
    (tmp_path / "there.safetensors").write_text("mine")
    for name in ("one.bin", "there.safetensors"):
        with refused(
            re.compile(r"convert .*/one\.bin|convert .*/there\.safetensors"), "safetensors"
        ):
            cli.app(["convert", str(tmp_path), str(tmp_path / name)], standalone_mode=False)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
