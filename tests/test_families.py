"""Every family: the stock pipeline's own numbers, students trained, exported and read back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from students import stock
from students.export import export, load_student, rehearse, request
from students.lora import Adapter
from teachers import UserError, load
from tests import families


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp(name))
        return str(made[name])

    return folder


def disturbed(student):
    """The student, moved away from its teacher."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return student


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("renoise", [True, False], ids=["renoise", "ode"])
def test_a_stock_pipeline_samples_the_student(folders, name, adapter, renoise):
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    student = disturbed(stock.student(teacher, 4, None, renoise, adapter)).eval()
    rehearse(student, teacher)


def some(chosen):
    """These families in every run, the others in the slow one: each starts another process."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow)
        for name in families.FAMILIES
    ]


@pytest.mark.parametrize("name", some({"sd"}))
def test_an_exported_student_is_read_back(folders, name, tmp_path):
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    student = disturbed(stock.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    again, _ = load_student(tmp_path / "student")
    prompts = request(student, teacher)[0][:2]
    z, cond = torch.randn(2, *teacher.shape), teacher.codec.condition(prompts)
    torch.testing.assert_close(
        again.at(2)(z, cond, 1), student.at(2)(z, cond, 1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", some({"sdxl"}))
def test_a_teacher_in_half_precision_is_rehearsed_and_exported(folders, name, tmp_path):
    teacher = load(folders(name), **families.OPTIONS.get(name, {}), precision="bf16")
    student = disturbed(stock.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    rehearse(student, teacher)
    export(student, teacher, tmp_path / "student", {})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_are_not_all_there_are_refused(folders, part, tmp_path):
    """Diffusers would leave them without values, transformers draw them at random."""
    copy = shutil.copytree(folders("sdxl"), tmp_path / "t")
    file = next((copy / part).glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"not whole: .*{name.split('.')[-1]} is missing"):
        load(str(copy))


def test_an_index_with_an_empty_entry_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders("sd"), tmp_path / "t")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": []}))
    with pytest.raises(UserError, match="unet: expected two names"):
        load(str(copy))
