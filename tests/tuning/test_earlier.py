"""A student that starts as an earlier one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config.recipe import Recipe
from distill.sampling.guided_teacher import load_teacher
from distill.training.networks import build_networks, objective_of
from students.export import earlier, lora_files
from students.export.folder import SIDECAR, load_student, sample_student
from students.export.forms import form_of
from students.lora import Adapter, adapter_of
from teachers import load
from teachers.adapters.files import LoRAFile
from teachers.adapters.fuse import Fusion
from teachers.errors import UserError
from tests.helpers import lora_formats
from tests.tuning.conftest import tree_of

PROMPTS = ["a dog on a hill", "a wug"]


def built(tree):
    teacher = load(tree["teacher"]["source"])
    return build_networks(Recipe.check(tree), teacher), teacher


def from_run(teacher, student, **adapter):
    tree = tree_of(teacher, student={"steps": 1, "init": str(student)})
    tree["adapters"] = {**tree["adapters"], **adapter}
    return built(tree)


@pytest.mark.parametrize("adapter", [{}, {"rank": 5, "alpha": None}])
def test_an_adapter_starts_as_the_earlier_one_at_any_greater_rank_and_scale(
    teacher, student, adapter
):
    networks, codec = from_run(teacher, student, **adapter)
    then, of_then = load_student(student)
    made = sample_student(networks["student"], codec, PROMPTS, 0)
    assert torch.allclose(made, sample_student(then, of_then, PROMPTS, 0), atol=1e-3)  # of ±30
    plain = form_of(load(str(teacher))).student(1, None, True, Adapter(rank=2))
    assert (made - sample_student(plain, codec, PROMPTS, 0)).abs().max() > 1


def test_the_anchor_is_the_earlier_student_without_the_teachers_new_lora(
    teacher, student, tmp_path
):
    """The LoRA file is in the base of the student in training, and not in that of the anchor."""
    tree = tree_of(teacher, student={"steps": 1, "init": str(student)})
    tree["objective"] = {"name": "dmd2-anchored", "known_from": 5}
    plain = load(str(teacher))
    layers = lora_formats.layers_of(plain.denoiser.backbone, r".*attn\d\.to_v")
    pairs = lora_formats.factors(plain.denoiser.backbone, layers)
    file = lora_formats.save(lora_formats.peft(pairs, "unet"), tmp_path / "new.safetensors")
    tree["teacher"] = {**tree["teacher"], "adapters": [{"file": str(file)}]}
    recipe = Recipe.check(tree)
    objective = objective_of(recipe, load_teacher(recipe.teacher), torch.device("cpu"))
    then, _ = load_student(student)
    x, t = torch.randn(2, *plain.shape), torch.full((2,), then.times[0])
    cond = plain.codec.condition(PROMPTS)
    with torch.no_grad():
        expected = then.denoiser(x, t, cond)
        assert torch.equal(objective.before(x, t, cond), expected)
        assert (objective.student.denoiser(x, t, cond) - expected).abs().max() > 1e-3
    assert not any(p.requires_grad for p in objective.before.parameters())


def test_the_other_networks_start_as_the_teacher(teacher, student):
    networks, codec = from_run(teacher, student)
    x, t = torch.randn(2, *codec.shape), torch.full((2,), 0.5)
    cond = codec.codec.condition(PROMPTS)
    with torch.no_grad():
        assert torch.equal(networks["fake"](x, t, cond), codec.denoiser(x, t, cond))


def test_without_a_lora_file_it_starts_on_the_weights_in_the_folder(teacher, student, tmp_path):
    """A folder that is moved away from its run; a new adapter on it, or the weights themselves."""
    folder = tmp_path / "student"
    folder.symlink_to(student / "student")
    tree = tree_of(teacher, student={"steps": 1, "init": str(folder)})
    then, of_then = load_student(student)
    for adapters in ({"rank": 2}, None):
        networks, codec = built({**tree, "adapters": adapters})
        made = networks["student"]
        assert torch.allclose(
            sample_student(made, codec, PROMPTS, 0),
            sample_student(then, of_then, PROMPTS, 0),
            atol=1e-3,
        )
        assert any(p.requires_grad or adapters for p in made.parameters())
        assert (adapter_of(made.denoiser) is not None) is (adapters is not None)
        assert not lora_files.possible(made, codec)  # a file would need these weights below it


def test_a_lora_file_in_the_weights_is_not_added_again_under_another_name_or_strength(tmp_path):
    known = {"file": "style.safetensors", "sha256": "ab", "strength": 0.75}
    (tmp_path / SIDECAR).write_text(json.dumps({"adapters": [known]}))

    def file(name, sha256, strength):
        return LoRAFile(tmp_path / name, "key", strength, sha256, (), 0)

    def lacking(*files):
        found = earlier.new_files(tmp_path, SimpleNamespace(fusion=Fusion(files)))
        return [(Path(f["file"]).name, f["strength"]) for f in found]

    assert lacking(file("renamed.safetensors", "ab", 0.75)) == []
    assert lacking(file("style.safetensors", "ab", 1.0)) == [("style.safetensors", 0.25)]
    assert lacking(file("style.safetensors", "cd", 0.75)) == [("style.safetensors", 0.75)]
    twice = (file("style.safetensors", "ab", 0.75), file("copy.safetensors", "ab", 0.5))
    assert lacking(*twice) == [("copy.safetensors", 0.5)]


def test_a_plan_reads_no_weights_of_an_earlier_student(teacher):
    tree = tree_of(teacher, student={"steps": 1, "init": "nowhere"})
    codec = load(str(teacher))
    networks = build_networks(Recipe.check(tree), codec, form_of(codec))
    assert adapter_of(networks["student"].denoiser) is not None


@pytest.mark.parametrize(
    ("adapter", "key"),
    [({"rank": 1}, "adapters.rank"), ({"targets": ".*to_q"}, "adapters.targets")],
)
def test_an_adapter_that_cannot_hold_the_earlier_one_is_refused(adapter, key, teacher, student):
    with pytest.raises(UserError) as error:
        from_run(teacher, student, **adapter)
    assert error.value.key == key


def test_a_folder_without_a_student_is_refused(teacher, tmp_path):
    for source in (tmp_path, tmp_path / "nowhere", teacher):
        with pytest.raises(UserError) as error:
            earlier.student_folder(str(source))
        assert error.value.key == "student.init"


def test_the_file_of_the_adapter_alone_is_taken(student, tmp_path):
    run = tmp_path / "run"
    (run / "lora").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert earlier.lora_of(run / "student") is None
    for name in (lora_files.DIFFUSERS, lora_files.TURBO[lora_files.DIFFUSERS]):
        save_file({"a": torch.zeros(1)}, run / "lora" / name)
        assert earlier.lora_of(run / "student") == run / "lora" / name
    assert earlier.lora_of(student / "student").name == lora_files.DIFFUSERS
    assert load_file(earlier.lora_of(student / "student"))
