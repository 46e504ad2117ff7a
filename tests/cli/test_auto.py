"""`distill auto` as a command: what it prints, writes, runs and refuses."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from distill import console
from distill.auto.start import start_of
from distill.auto.subject import pictures_in, subject_of
from distill.cli import train
from distill.config.recipe import Recipe
from distill.planning import forecast
from distill.planning.plan import Plan
from students.export import sampler_file
from tests.helpers import own
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line

PAGE = Path(__file__).parent.parent.parent / "docs/auto.md"
SDXL, FLUX = "stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"


def planned(recipe):
    """A plan of 15 GB for each 64 ranks, in place of a simulated step of minutes."""
    size = int(15e9 * recipe.adapters.rank / 64)
    return Plan(size, 0, 0, 0, 0, 0, 10**9, recipe.train.batch, "bf16", flops=5e14, family="sdxl")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, with quick plans and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "plan", planned)
    monkeypatch.setattr(console.out, "width", 80)
    return tmp_path


def transcript(command):
    """What docs/auto.md shows below a command."""
    found = re.search(rf"```\n\$ {re.escape(command)}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found, command
    return found[1]


def test_the_page_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.out, "width", 80)
    code, out, _ = called(capsys, "auto", "digits", "--gpu", "rtx-4090", "--hours", "1")
    shown = [line.rstrip() for line in out.splitlines()]
    expected = transcript("distill auto digits --gpu rtx-4090 --hours 1").splitlines()
    assert (code, shown) == (0, expected)
    recipe = Recipe.load("runs/auto-digits/recipe.yaml")
    assert recipe.objective["name"] == "dmd2"
    assert not Path("runs/auto-digits/run").exists()  # no terminal, no --yes


def test_a_model_whose_weights_are_not_here_is_planned_and_not_run(place, capsys):
    code, out, _ = called(capsys, "auto", SDXL, "--gpu", "rtx-4090", "--steps", "2", "--out", "o")
    assert code == 0
    for part in ("16.0 of 24 GB", "doctor: not asked", "$3.60", "Not known (", "as asked"):
        assert part in out, part
    assert [p.name for p in (place / "o").iterdir()] == ["recipe.yaml"]
    recipe = Recipe.load(place / "o/recipe.yaml")
    assert (recipe.student.steps, recipe.teacher.source) == (2, SDXL)
    assert "distill run o/recipe.yaml --out o/run" in out
    assert "We expect" not in out and "we expect a somewhat worse figure" in " ".join(out.split())


def test_yes_runs_the_recipe_that_was_written(place, capsys, monkeypatch):
    runs = []
    monkeypatch.setattr(train, "run", lambda *words: runs.append(words))
    assert called(capsys, "auto", SDXL, "--gpu", "h100", "--yes")[0] == 0
    folder = Path("runs/auto-stable-diffusion-xl-base-1.0")
    assert runs == [(str(folder / "recipe.yaml"), [], folder / "run")]


def test_a_dash_prints_the_recipe_alone(place, capsys):
    code, out, _ = called(capsys, "auto", SDXL, "--gpu", "rtx-4090", "--out", "-")
    assert code == 0
    assert Recipe.check(yaml.safe_load(out)).train.batch == 8
    assert "# Expected on rtx-4090: 8.0 h, 16.0 of 24 GB, $3.60." in out
    assert list(place.iterdir()) == []


def test_a_network_of_ones_own_gets_a_recipe_that_runs(tmp_path, monkeypatch, capsys):
    """Without data an objective that needs none; its critic's block is not known, so no critic."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.out, "width", 80)
    file = own.write(tmp_path)
    words = ("auto", f"{file}:teacher", "--gpu", "rtx-4090", "--hours", "1", "--out", "o")
    code, out, err = called(capsys, *words)
    assert code == 0, err
    recipe, said = Recipe.load("o/recipe.yaml"), " ".join(out.split())
    assert (recipe.objective["name"], recipe.student.start) == ("diff-instruct", None)
    assert "doctor: passed" in said and "10 parameters" in Path("o/recipe.yaml").read_text()
    code, _, err = called(capsys, "run", "o/recipe.yaml", "train.steps=20", "--out", "o/run")
    assert code == 0, err
    assert sampler_file.sample(Path("o/run/student"), 5, seed=0).shape == (5, 2)
    tree = start_of(subject_of(f"{file}:teacher"), None, {"source": f"{file}:data"}).tree
    assert "critic" not in tree and tree["data"] == {"source": f"{file}:data"}


def test_a_closed_form_is_refused(place, capsys):
    code, _, err = called(capsys, "auto", "analytic:gaussian")
    assert code == 2
    refused_line(err, "teacher", "Gaussian")


REFUSED = {
    "gpu": (["--gpu", "rtx-9999"], "--gpu", "rtx-4090 (24 GB)", "h200 (141 GB)"),
    "gpu without dash": (["--gpu", "RTX4090"], "--gpu", "did you mean 'rtx-4090'?"),
    "no hours": (["--hours", "0"], "--hours"),
    "negative": (["--hours", "-1"], "--hours", "-1"),
    "nan": (["--hours", "nan"], "--hours", "nan"),
    "endless": (["--hours", "1e300"], "--hours", "1e+300"),
    "few": (["--hours", "0.01", "--gpu", "rtx-4090"], "--hours", "training steps of 8 samples"),
    "lora": (["--lora", "none.safetensors:0.5"], "--lora", "none.safetensors"),
    "data": (["--data", "nowhere"], "--data", "nowhere"),
    "dash": (["--out", "-", "--yes"], "--out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_write_nothing(case, place, capsys):
    words, key, *values = REFUSED[case]
    code, out, err = called(capsys, "auto", SDXL, *words)
    assert (code, out) == (2, "")
    refused_line(err, key, *values)
    assert list(place.iterdir()) == []


def test_too_little_memory_says_what_the_smallest_form_needs(place, capsys, monkeypatch):
    monkeypatch.setattr(
        forecast, "plan", lambda r: Plan(40 * 10**9, 0, 0, 0, 0, 0, 1, 8, "bf16", flops=1.0)
    )
    code, _, err = called(capsys, "auto", FLUX, "--gpu", "rtx-4090")
    assert code == 2
    refused_line(err, "--gpu", "LoRA of rank 16 on nf4 weights", "needs 41.0 GB", "has 24")
    assert list(place.iterdir()) == []


LORAS = {  # the first key of a file, the place that is named, and a value of the line
    "another model's": ("transformer.blocks.0.to_q", "--lora", "0 of 1 pairs"),
    "of an encoder": ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "--lora",
                      "text encoders"),
}  # fmt: skip


@pytest.mark.parametrize("case", LORAS)
def test_a_lora_that_does_not_fit_is_refused(case, place, capsys):
    layer, key, value = LORAS[case]
    pair = {"lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(8, 2)}
    save_file({f"{layer}.{k}.weight": v for k, v in pair.items()}, "other.safetensors")
    code, _, err = called(capsys, "auto", SDXL, "--gpu", "rtx-4090", "--lora", "other.safetensors")
    assert code == 2
    refused_line(err, key, "other.safetensors", value)
    assert [p.name for p in place.iterdir()] == ["other.safetensors"]


def test_a_folder_with_a_recipe_is_not_written_over(place, capsys):
    (place / "o").mkdir()
    (place / "o/recipe.yaml").write_text("mine")
    code, _, err = called(capsys, "auto", SDXL, "--gpu", "rtx-4090", "--out", "o")
    assert code == 2
    refused_line(err, "--out", "recipe.yaml")
    assert (place / "o/recipe.yaml").read_text() == "mine"


def test_a_folder_of_pictures_below_the_home_folder_is_read(monkeypatch, tmp_path):
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pictures_in({"source": "~/photos"}) == tmp_path / "photos"
