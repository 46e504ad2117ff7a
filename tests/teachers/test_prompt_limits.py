"""Prompts that an encoder does not read to their end: counted for every family, by encoder."""

import sys

import pytest
import torch

from distill.__main__ import main
from distill.config.recipe import Recipe
from distill.data import cache, from_recipe
from distill.data.encode import counting, print_cuts
from distill.sampling import guided_teacher
from students import schedulers
from students.export.folder import export
from teachers import load
from teachers.prompt_limits import Cut, Cuts
from tests.helpers import families

LIMITS = {  # of each family's encoders: what its pipeline lets the tokenizer make, at most
    "sd": {"text_encoder": 40},
    "sdxl": {"text_encoder": 40, "text_encoder_2": 40},
    "pixart-alpha": {"text_encoder": 120},
    "pixart-sigma": {"text_encoder": 300},
    "sd3": {"text_encoder": 40, "text_encoder_2": 40},
    "sd3.5": {"text_encoder": 40, "text_encoder_2": 40, "text_encoder_3": 256},
    "flux-schnell": {"text_encoder": 40, "text_encoder_2": 512},
    "sana": {"text_encoder": None},  # its instruction's tokens, and 300
    "lumina": {"text_encoder": 256},
    "qwen": {"text_encoder": 512 + 34},  # with those of its template, which are dropped
    "zimage": {"text_encoder": 512},
    "wan": {"text_encoder": 512},
}


@pytest.mark.parametrize("name", LIMITS)
def test_every_encoder_of_every_family_counts_what_it_cuts(folders, name):
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    codec = teacher.codec
    held = dict(vars(codec.pipe))
    plain = codec.condition(["a", "b c"])
    with counting(teacher) as cuts:
        watched = codec.condition(["a", "x" * 3000, "y" * 3000])
    read = plain["mask"][0].bool() if "mask" in plain else slice(None)
    for key, value in plain.items():  # they are only looked at
        rows = read if key == "text" else slice(None)
        torch.testing.assert_close(watched[key][0][rows], value[0][rows], atol=1e-4, rtol=1e-4)
    assert vars(codec.pipe) == held
    found = {k.partition(" ")[0]: v for k, v in cuts.encoders.items()}
    assert cuts.read == 3 and found.keys() == LIMITS[name].keys()
    for part, limit in LIMITS[name].items():
        assert found[part].prompts == 2 and found[part].first == "x" * 3000
        assert found[part].limit == limit or (limit is None and found[part].limit > 298)
    with counting(teacher) as cuts:
        codec.condition(["a", "b c"])
    assert cuts.read == 2 and not any(c.prompts for c in cuts.encoders.values())


@pytest.mark.parametrize("name", ["sd", "sd3.5", "pixart-alpha"])
def test_the_last_prompt_that_fits_is_not_counted(folders, name):
    """Letters of the small tokenizers are tokens; a CLIP adds two, T5 its end and a beginning."""
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    part = list(LIMITS[name])[-1]
    limit = LIMITS[name][part]
    for letters, cut in ((limit - 2, 0), (limit - 1, 1)):
        with counting(teacher) as cuts:
            teacher.codec.condition(["x" * letters])
        found = {k.partition(" ")[0]: v for k, v in cuts.encoders.items()}
        assert found[part].prompts == cut


def test_negative_prompts_are_counted_when_they_are_encoded(folders, capfd):
    tree = {
        "teacher": {"source": folders("sd"), "guidance": 2, "negative_prompt": "z" * 50},
        "objective": {"name": "dmd2"},
        "train": {"steps": 2, "batch": 2},
    }
    guided_teacher.load_teacher(Recipe.check(tree).teacher)
    err = capfd.readouterr().err
    assert err == (
        "distill: teacher.negative_prompt: 1 of 1 prompt is longer than the encoder's 40 tokens "
        f"and was cut (first: '{'z' * 50}')\n"
    )


def data(folder, tmp_path, **more):
    (tmp_path / "p.txt").write_text("\n".join(["a", "b" * 60, "c", "d" * 60]) + "\n")
    tree = {
        "teacher": folder,
        "objective": {"name": "sid"},
        "data": {"prompts": str(tmp_path / "p.txt"), "cache": str(tmp_path / "cache"), **more},
        "train": {"steps": 2, "batch": 2},
    }
    return Recipe.check(tree)


def test_a_run_says_it_and_one_from_a_cache_says_it_too(folders, tmp_path, capfd):
    recipe = data(folders("sdxl"), tmp_path)
    teacher = load(folders("sdxl"))
    capfd.readouterr()  # what building the folder said
    said = []
    for place in ("memory", "made", "kept"):
        if place == "made":
            cache.fill(from_recipe.encoding_job(recipe, teacher), recipe.data)
            capfd.readouterr()
        from_recipe.source_of(recipe, teacher)
        said.append(capfd.readouterr().err)
    assert said[0] == said[1] == said[2]
    lines = said[0].splitlines()
    assert len(lines) == 2 and all("2 of 4 prompts are longer than" in line for line in lines)
    assert "text_encoder (CLIPTextModel)'s 40 tokens and were cut there" in lines[0]
    assert "text_encoder_2 (CLIPTextModelWithProjection)'s 40 tokens" in lines[1]
    assert all(f"(first: '{'b' * 60}')" in line for line in lines)


def test_one_process_of_several_says_it(folders, monkeypatch, capfd):
    cuts = Cuts(3, {"text_encoder (X)": Cut(7, 1, "long")})
    monkeypatch.setenv("RANK", "1")
    print_cuts(cuts, "data.prompts")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    print_cuts(cuts, "data.prompts")
    assert "1 of 3 prompts is longer than the encoder's 7 tokens" in capfd.readouterr().err


@pytest.mark.slow
def test_a_sampled_prompt_is_counted_once(folders, tmp_path, capfd, monkeypatch):
    """distill sample says once that a prompt is cut."""
    teacher = load(folders("sd"))
    export(schedulers.student(teacher, 1).eval(), teacher, tmp_path / "s", {})
    words = ["sample", str(tmp_path / "s"), "--out", str(tmp_path / "x.npz"), "--n", "4"]
    monkeypatch.setattr(sys, "argv", ["distill", *words, "--prompt", "q" * 60])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert "--prompt: 1 of 1 prompt is longer than the encoder's 40" in capfd.readouterr().err


def test_what_was_counted_survives_a_plain_tree():
    from dataclasses import asdict

    cuts = Cuts(3, {"a": Cut(7, 1, "long")})
    again = Cuts.of_tree(asdict(cuts))
    assert again == cuts
    again.add(Cuts(2, {"a": Cut(7, 2, "other"), "b": Cut(9)}))
    assert again == Cuts(5, {"a": Cut(7, 3, "long"), "b": Cut(9)})
