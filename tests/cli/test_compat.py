"""`distill compat`: LoRA files in a student and in its teacher, on small pipelines."""

import json
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from distill.config.paths import START, note_start
from distill.evaluation import compat as compat_module
from distill.evaluation import compat_page
from distill.evaluation.compat import compare
from distill.evaluation.compat_checks import Request, recipe_of, turbo_file
from students import schedulers
from students.export import folder as exporting
from students.export.lora_files import COMFYUI, DIFFUSERS, TURBO, forms
from students.lora import Adapter
from teachers import load
from tests.helpers import families, lora_formats
from tests.helpers.command_line import called
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused, refused_line

PROMPTS = ["a cat", "two dogs", "a red hat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with an adapter of a small Stable Diffusion, a user's LoRA, and prompts."""
    root = tmp_path_factory.mktemp("compat")
    source = families.build("sd", root / "teacher")
    teacher = load(str(source))
    student = disturbed(schedulers.student(teacher, 2, adapter=Adapter(rank=4))).eval()
    recipe = {"teacher": {"source": str(source), "guidance": 3}, "eval": {"teacher_steps": 4}}
    with patch.object(exporting, "verify", lambda *_: None):
        exporting.export(student, teacher, root / "run" / "student", recipe)
    (root / "run" / "lora").mkdir()
    save_file(forms(student, teacher)[0][DIFFUSERS], root / "run" / "lora" / DIFFUSERS)
    network: Any = teacher.denoiser
    layers = lora_formats.layers_of(network.backbone, r".*attn\d?\.(to_q|to_v)")
    pairs = lora_formats.factors(network.backbone, layers)
    state = lora_formats.peft(pairs, "unet")
    lora_formats.save(state, root / "style.safetensors")
    state["unet.nowhere.to_q.lora_A.weight"] = state[min(state)]
    lora_formats.save(state, root / "half.safetensors")
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return SimpleNamespace(
        root=root, run=root / "run", style=root / "style.safetensors", pairs=pairs, prompts=prompts
    )


def request(made, *strengths, **more):
    asked = {"prompts": made.prompts, "samples": 4, "steps": None, "teacher": None} | more
    return Request(made.run, (made.style,), strengths, features=None, **asked)


def test_the_command_writes_figures_and_pictures_and_prints_a_table(made, tmp_path, capsys):
    out = tmp_path / "out"
    code, text, err = called(
        capsys, "compat", made.run, made.style, "--prompts", made.prompts, "--samples", 4,
        "--strengths", "0,1", "--out", out,
    )  # fmt: skip
    assert code == 0 and err == ""
    tree = json.loads((out / "compat.json").read_text())
    assert tree["teacher"] | {"guidance": 3} == {
        "source": str(made.root / "teacher"), "guidance": 3, "solver": "heun", "steps": 4,
    }  # fmt: skip
    assert tree["teacher"]["guidance"]["scale"] == 3
    assert (tree["steps"], tree["samples"], tree["prompts"]) == (2, 4, PROMPTS)
    assert tree["features"] == "pixels averaged to 8×8" and tree["prompt_score"] is None
    nothing, whole = tree["rows"]
    assert nothing["same_pixels"] == {"teacher": True, "student": True}
    assert nothing["shift_ratio"] is None and nothing["student"] == tree["plain"]["student"]
    assert whole["same_pixels"] == {"teacher": False, "student": False}
    assert whole["pairs"] == len(made.pairs) and whole["overlap"]["layers"] == len(made.pairs)
    assert tree["worst"]["shift_cosine"] == {
        "value": whole["shift_cosine"], "lora": "style", "strength": 1.0,
    }  # fmt: skip
    rows = [line.split() for line in text.splitlines()]
    assert [r[:2] for r in rows if r and r[0] == "style"] == [["style", "0"], ["style", "1"]]
    assert f"{whole['shift_ratio']:.2f}" in text and str(out) in text
    picture = Image.open(out / "compat.png")
    # 64 pixels for each of three pictures of 16, two rows
    assert picture.height > 2 * 64 and picture.width > 4 * 3 * 64
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100


def test_the_table_keeps_a_name_on_one_line_of_eighty_columns():
    figures = {"saturation": 0.337, "clipped": 0.003, "prompt_score": 31.203}
    row = {
        "lora": "monochrome", "strength": 0.5, "shift_ratio": 0.91, "shift_cosine": 0.94,
        "teacher_halves_cosine": 0.99, "overlap": {"layers": 3, "mean": 0.22, "by_chance": 0.21},
    }  # fmt: skip
    both = {"teacher": figures, "student": figures}
    tree = {
        "teacher": {"steps": 32, "solver": "heun"}, "steps": 4, "samples": 120, "plain": both,
        "prompt_score": "clip_score", "rows": [row | both], "features": "pixels",
    }  # fmt: skip
    console = Console(width=80, file=StringIO())
    console.print(compat_page.table(tree))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert [
        "monochrome", "0.5", "0.91", "0.94", "0.337→0.337", "0.3→0.3", "31.203→31.203", "0.22",
    ] in lines  # fmt: skip


@pytest.mark.slow
def test_a_lora_is_added_to_both_as_its_factors_say(made):
    """The student with the file is the student with B A in its weights, to the bit."""
    _, pictures = compare(request(made, 1.0, 0.5))
    for strength in (1.0, 0.5):
        generator, teacher = exporting.load_student(made.run)
        backbone: Any = generator.denoiser.backbone  # pyright: ignore
        for name, (down, up) in made.pairs.items():
            weight = backbone.get_submodule(name).weight
            weight += up @ down * strength
        x = exporting.sample_student(generator, teacher, [*PROMPTS, PROMPTS[0]], 0)
        ours = ((teacher.codec.decode(x) * 127.5) + 128).clamp(0, 255).to(torch.uint8)
        theirs = pictures["student"][0, strength]
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert not torch.equal(theirs, pictures["student"][None])


def test_a_lora_beside_the_runs_start_is_found_from_any_folder(made, tmp_path, monkeypatch):
    """And one that is gone is named where it was."""
    monkeypatch.chdir(made.root)
    note_start(made.run)
    monkeypatch.chdir(tmp_path)
    with teacher_section(made, adapters=[{"file": "style.safetensors"}]):
        (entry,) = recipe_of(request(made, 1.0)).teacher.adapters or ()
        assert entry.file == str(made.style)
    with (
        teacher_section(made, adapters=[{"file": "gone.safetensors"}]),
        refused("teacher.adapters.0.file", made.root / "gone.safetensors"),
    ):
        compare(request(made, 1.0))
    (made.run / START).unlink()


@contextmanager
def teacher_section(made, **keys):
    """Within it, the student's recipe has other keys of its teacher."""
    sidecar = made.run / "student" / "fewstep.json"
    before = sidecar.read_text()
    tree = json.loads(before)
    tree["recipe"]["teacher"] |= keys
    sidecar.write_text(json.dumps(tree))
    try:
        yield
    finally:
        sidecar.write_text(before)


@pytest.mark.slow
def test_the_teacher_keeps_its_guidance_and_the_recipes_own_lora(made, monkeypatch):
    """The recipe's own LoRA stays in the teacher; those to be tried come on top."""
    seen = []
    real = compat_module.load_teacher

    def watched(section):
        seen.append([(Path(a.file).name, a.strength) for a in section.adapters or ()])
        return real(section)

    monkeypatch.setattr(compat_module, "load_teacher", watched)
    with teacher_section(made, adapters=[{"file": str(made.style), "strength": 0.25}]):
        compare(request(made, 1.0, samples=2))
    own = ("style.safetensors", 0.25)
    assert seen == [[own], [own, ("style.safetensors", 1.0)]]


@pytest.mark.slow
def test_a_lora_is_added_to_a_teacher_before_it_is_quantised(made):
    """An nf4 teacher has the LoRA in full, as it is added to the weights of the files."""
    with teacher_section(made, precision="nf4"):
        tree, _ = compare(request(made, 1.0, samples=2))
    assert tree["rows"][0]["same_pixels"] == {"teacher": False, "student": False}
    assert tree["rows"][0]["pairs"] == len(made.pairs)


@pytest.mark.slow
def test_a_class_conditional_student_draws_its_labels(tmp_path):
    """A student of class labels beside its teacher, for labels."""
    source = families.build("dit", tmp_path / "teacher")
    teacher = load(str(source))
    recipe = {"teacher": {"source": str(source)}, "eval": {"teacher_steps": 2}}
    with patch.object(exporting, "verify", lambda *_: None):
        student = disturbed(schedulers.student(teacher, 2))
        exporting.export(student, teacher, tmp_path / "student", recipe)
    network: Any = teacher.denoiser
    layers = lora_formats.layers_of(network.backbone, r".*attn1\.to_v")
    state = lora_formats.peft(lora_formats.factors(network.backbone, layers), "transformer")
    file = lora_formats.save(state, tmp_path / "style.safetensors")
    asked = Request(tmp_path / "student", (file,), (1.0,), None, 3, 1, None, None)
    tree, pictures = compare(asked)
    assert tree["prompts"] == ["0", "333", "666"] and tree["steps"] == 1
    assert tree["rows"][0]["overlap"] is None  # no file of its own adapter
    assert tree["rows"][0]["shift_ratio"] > 0
    assert pictures["student"][0, 1.0].shape == pictures["teacher"][None].shape


def test_the_students_own_lora_is_the_turbo_alone_where_there_are_both(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "student" / "fewstep.json").write_text("{}")
    assert turbo_file(tmp_path) is None
    for name in (COMFYUI, DIFFUSERS, TURBO[DIFFUSERS]):  # each before those that were there
        (tmp_path / "lora" / name).touch()
        assert turbo_file(tmp_path) == tmp_path / "lora" / name
        assert turbo_file(tmp_path / "student") == tmp_path / "lora" / name


@pytest.mark.parametrize(
    ("words", "key", "fragment"),
    [
        (["{root}/half.safetensors"], "LORA", "nowhere"),
        (["{root}/nothing.safetensors"], "LORA *", "no such file"),
        (["~nosuch/x.safetensors"], "*nosuch*", "nosuch"),
        (["{root}/prompts.txt"], "LORA", "prompts.txt cannot be read"),
        (["{style}", "--strengths", "0.5,x"], "--strengths", "0.5,x"),
        (["{style}", "--strengths", "nan"], "--strengths", "nan"),
        (["{style}", "--steps", "3"], "--steps", "3"),
        (["{style}", "--features", "inseption"], "--features", "inseption"),
        (["{style}", "--prompts", "{root}/none.txt"], "--prompts", "none.txt"),
        (["{style}", "--prompts", "{style}"], "--prompts", "style"),
        (["{style}", "--teacher", "{root}/none"], "teacher*", "none"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(made, tmp_path, capsys, words, key, fragment):
    words = [w.format(root=made.root, style=made.style) for w in words]
    out = tmp_path / "out"
    code, text, err = called(capsys, "compat", made.run, *words, "--out", out)
    assert (code, text) == (2, "")
    refused_line(err, key, fragment)
    assert not out.exists()


def test_a_student_of_pixels_takes_no_lora_files(pipelines, made, tmp_path, capsys):
    teacher = load(str(pipelines["eps"]))
    recipe = {"teacher": {"source": str(pipelines["eps"])}}
    with patch.object(exporting, "verify", lambda *_: None):
        exporting.export(schedulers.student(teacher, 1), teacher, tmp_path / "student", recipe)
    out = tmp_path / "out"
    code, _, err = called(capsys, "compat", tmp_path / "student", made.style, "--out", out)
    assert code == 2
    refused_line(err, "student *", "takes no LoRA files")
    assert not out.exists()
