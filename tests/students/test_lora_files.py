"""A run's LoRA files: loaded by stock diffusers at strength 1.0, they are the merged student."""

import pytest
from safetensors.torch import load_file

from students import schedulers
from students.export.folder import ExportError, export
from students.export.lora_files import COMFYUI, DIFFUSERS, export_lora, possible
from students.lora import Adapter
from teachers import load
from tests.helpers import families
from tests.helpers.disturbed import disturbed


@pytest.mark.parametrize(
    "name",  # two text encoders, packed latents; the others take half a minute
    [pytest.param("sdxl", marks=pytest.mark.slow), pytest.param("sd3", marks=pytest.mark.slow),
     pytest.param("flux-schnell", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_lora_file_draws_the_students_pictures(name, tmp_path):
    """The LoRA files of SDXL and SD3 draw what the student draws."""
    folder = families.build(name, tmp_path / "teacher")
    teacher = load(str(folder), **families.OPTIONS.get(name, {}))
    student = disturbed(
        schedulers.student(teacher, 2, None, True, Adapter(rank=4, alpha=8.0))
    ).eval()
    assert possible(student, teacher)
    export(student, teacher, tmp_path / "student", {})
    export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    state = load_file(tmp_path / "lora" / DIFFUSERS)
    assert len(state) == len(list(student.parameters()))
    assert (tmp_path / "lora" / COMFYUI).exists()
    assert (tmp_path / "lora" / "scheduler" / "scheduler_config.json").exists()


@pytest.mark.slow
def test_a_file_that_is_another_students_is_never_named(tmp_path):
    """A LoRA file that draws other pictures than the student is not kept."""
    teacher = load(str(families.build("sd", tmp_path / "teacher")))
    student = disturbed(schedulers.student(teacher, 1, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    object.__setattr__(student.denoiser.config, "lora_alpha", 40)  # says ten times what it does
    with pytest.raises(ExportError, match="differs from the student"):
        export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    assert not (tmp_path / "lora" / DIFFUSERS).exists()


def test_only_plain_lora_on_a_pipelines_network_has_files(tmp_path):
    teacher = load(str(families.build("sd", tmp_path / "teacher")))
    assert not possible(schedulers.student(teacher), teacher)
    assert not possible(schedulers.student(teacher, adapter=Adapter("dora", rank=2)), teacher)


def test_a_pipeline_that_loads_no_lora_has_no_files_unless_comfyui_has_its_network(tmp_path):
    """PixArt's file: test_comfyui_names.py."""
    teacher = load(str(families.build("dit", tmp_path / "teacher")))
    assert not possible(schedulers.student(teacher, adapter=Adapter(rank=2)), teacher)
