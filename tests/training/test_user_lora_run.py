"""A run whose teacher has a LoRA file in its weights, from captions, to its two LoRA files."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distill.config.recipe import Recipe
from distill.evaluation.finish import finish
from distill.training.build import build
from distill.training.run_folder import ADAPTERS
from students.export.lora_files import COMFYUI, DIFFUSERS, TURBO
from teachers.errors import UserError
from tests.helpers import families
from tests.helpers import lora_formats as formats

CAPTIONS = [f"ink, a {thing} {place}" for thing in ("fox", "dog", "cat", "cow", "hen", "ox")
            for place in ("on a hill", "in the rain", "at a lake", "by a wall")]  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """A recipe of Stable Diffusion with a LoRA file and captions."""
    from teachers import load

    folder = families.build("sd", tmp_path / "teacher")
    network = load(str(folder)).codec.pipe.unet
    pairs = formats.factors(network, formats.layers_of(network, r".*attn\d\.to_v"))
    file = formats.save(formats.kohya(pairs, "lora_unet", 2.0), tmp_path / "style.safetensors")
    (tmp_path / "captions").mkdir()
    for i, caption in enumerate(CAPTIONS):
        (tmp_path / "captions" / f"{i}.txt").write_text(caption)
    return {
        "teacher": {"source": str(folder), "guidance": 3, "adapters": [{"file": str(file)}]},
        "student": {"steps": 2},
        "objective": {"name": "dmd2"},
        "adapters": {"rank": 2},
        "data": {"captions": str(tmp_path / "captions")},
        "train": {"steps": 2, "batch": 2, "sample_every": 0},
    }


@pytest.mark.slow
def test_a_run_ends_with_a_file_of_both_and_one_of_the_turbo_alone(tree, tmp_path, capsys):
    """From a LoRA and 24 captions to both LoRA files; the players share the base with the LoRA."""
    run = build(Recipe.check(tree), tmp_path / "run")
    teacher, student = run.teacher, run.student
    shared = teacher.denoiser.backbone
    objective = run.engine.objective
    for player in (student.denoiser, objective.fake, objective.teacher.denoiser):
        while hasattr(player, "denoiser"):
            player = player.denoiser
        assert player.backbone is shared
    run.engine.train()
    summary = finish(run)
    assert summary["failed"] == {}
    lora = tmp_path / "run" / "lora"
    names = {p.name for p in lora.glob("*.safetensors")}
    assert names == {DIFFUSERS, COMFYUI, *TURBO.values()}
    both, alone = load_file(lora / DIFFUSERS), load_file(lora / TURBO[DIFFUSERS])
    assert both.keys() == alone.keys() and both.keys()
    err = capsys.readouterr().err
    assert "data.captions: 24 captions, trigger 'ink'" in err
    assert "style.safetensors: 8 of 8 pairs" in err
    content = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert content["trigger"] == "ink" and len(content["prompts"]) == 2000
    assert "`style.safetensors` at 1" in (tmp_path / "run/student/README.md").read_text()


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_file_of_that_name(tree, tmp_path):
    """A user's LoRA file that has changed since is refused when a run goes on."""
    build(Recipe.check(tree), tmp_path / "run").engine.train()
    kept = yaml.safe_load((tmp_path / "run" / ADAPTERS).read_text())
    assert [k["file"] for k in kept] == ["style.safetensors"]
    file = tmp_path / "style.safetensors"
    save_file({k: torch.ones_like(v) for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError) as error:
        build(Recipe.check(tree), tmp_path / "run", resume=True)
    assert error.value.key == "--resume"
