"""Pipelines that no family names: read from a run of theirs, or refused with what is not known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from distill.planning.doctor import diagnose, pictures_for
from students import schedulers
from students.export.folder import export, load_student, rehearse, sample_student
from students.lora import Adapter
from teachers import load
from teachers.families import base
from teachers.pipelines.unseen import Unseen, UnseenUNet
from tests.helpers import families, families_b
from tests.helpers.command_line import called
from tests.helpers.disturbed import disturbed
from tests.helpers.doctor import first_broken
from tests.helpers.refusals import refused, refused_line

PROMPTS = ["a red circle", "two boats"]


def tried(folder, name, **more):
    """The family's small pipeline, as the generic adapter reads it without the family."""
    kind = UnseenUNet if name in ("sd", "sdxl") else Unseen
    size = families.OPTIONS.get(name, {}).get("size")
    return base.load(kind, folder, str(folder), size=size, **more)


@pytest.fixture(scope="module")
def ovis(tmp_path_factory):
    """A pipeline of diffusers that no family names."""
    root = tmp_path_factory.mktemp("ovis")
    torch.manual_seed(0)
    tokenizer = families_b.qwen_tokenizer()
    config = transformers.Qwen3Config(**families_b.LANGUAGE, vocab_size=len(tokenizer), head_dim=8)
    network = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    diffusers.OvisImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=families_b.kl_vae(2),
        text_encoder=transformers.Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=network,
    ).save_pretrained(root)
    return root


@pytest.mark.parametrize(
    "name", ["auraflow", "flux2-klein", "krea2", "sd", "sd3.5", "flux-schnell"]
)
@torch.no_grad()
def test_what_is_read_is_what_the_family_declares(folders, name):
    """Network arguments, time, layout, times, shift, codec: the same x̂ and the same latents."""
    known = load(folders(name), **families.OPTIONS.get(name, {}))

    read = tried(Path(folders(name)), name)
    mine, theirs = read.denoiser, known.denoiser
    assert read.shape == known.shape and read.codec.size == known.codec.size
    assert (mine.GRID, mine.SEEDED, mine.FRAMED) == (theirs.GRID, theirs.SEEDED, theirs.FRAMED)
    t = torch.tensor([0.3, 0.8])
    for a, b in zip(mine.process.scales(t), theirs.process.scales(t), strict=True):
        torch.testing.assert_close(a, b)
    x_t = torch.randn(2, *known.shape)
    conds = [teacher.codec.condition(PROMPTS) for teacher in (read, known)]
    torch.testing.assert_close(mine(x_t, t, conds[0]), theirs(x_t, t, conds[1]))
    images = torch.rand(1, 3, *known.codec.size) * 2 - 1
    x = known.codec.encode(images)
    torch.testing.assert_close(read.codec.encode(images), x)
    torch.testing.assert_close(read.codec.decode(x), known.codec.decode(x))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("chroma", "attention_mask"),  # lengthened by the image's tokens
        ("ernie", "encode_prompt"),  # padded to the longest prompt
        ("hunyuan", "encode_prompt 2 times"),
        ("qwen", "encoder_hidden_states"),  # as long as the longest
        ("sdxl", "scheduler's sample"),  # scaled for the network
    ],
)
def test_what_is_not_recognised_is_named(folders, name, fault):

    with refused("teacher '*'", "Pipeline", fault, "docs/teachers.md"):
        tried(Path(folders(name)), name)


@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
def test_a_pipeline_never_seen_has_students_that_it_samples(ovis, adapter, capsys):
    teacher = load(str(ovis), size=32)
    err = capsys.readouterr().err
    assert "OvisImagePipeline" in err and "distill doctor" in err
    student = schedulers.student(teacher, 2, None, adapter is None, adapter)
    rehearse(disturbed(student).eval(), teacher)


def test_the_doctor_finds_nothing_wrong_with_it(ovis):
    teacher = load(str(ovis), size=32)
    checks = diagnose(teacher, pictures_for(teacher, None), structure_only=True)
    assert {c.verdict for c in checks} == {"ok", "left out"}, first_broken(checks)


def test_it_is_of_the_size_that_it_was_read_with(ovis):
    teacher = load(str(ovis), size=32)
    cond = teacher.codec.condition(PROMPTS)
    with refused("data.size", "(4, 8, 8)", "(4, 16, 16)"):
        teacher.denoiser(torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.6]), cond)


def test_a_clear_no_is_one_line_and_code_2(folders, tmp_path, capsys):
    """A pipeline that needs a picture: SDXL's image to image, on the same parts."""
    copy = shutil.copytree(folders("sdxl"), tmp_path / "t")
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    code, _, err = called(capsys, "doctor", copy)
    assert code == 2
    refused_line(err, "teacher '*'", "StableDiffusionXLImg2ImgPipeline")


def test_a_class_that_diffusers_has_not_is_refused_as_before(folders, tmp_path):
    copy = shutil.copytree(folders("sd"), tmp_path / "t")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoPipeline"}))
    with refused("teacher '*'", "NoPipeline"):
        load(str(copy))


@pytest.mark.slow
def test_its_students_are_exported_and_read_back(ovis, tmp_path):
    """A student of a pipeline never seen, in another process of stock diffusers and read by us."""
    teacher = load(str(ovis), size=32)
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    again, _ = load_student(tmp_path / "student")
    mine, theirs = (sample_student(g.at(2), teacher, PROMPTS, 0) for g in (student, again))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
