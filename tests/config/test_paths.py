"""Relative paths of a recipe's file: beside it, and from any working folder."""

import os
from pathlib import Path

import pytest
import yaml

from distill.benchmark.spec import Bench
from distill.config.paths import START, beside, from_start, located, note_start
from distill.config.recipe import SHIPPED, Recipe, read_recipe, shipped

TREE = {
    "teacher": {
        "source": "model",
        "vae": "vae.pt",
        "guidance": {"scale": 2, "kind": "auto", "weaker": "weak"},
        "adapters": [{"file": "style.safetensors"}, {"file": "absent.safetensors"}],
    },
    "student": {"steps": 1},
    "objective": {"name": "mine.py:Mine"},
    "data": {"prompts": "table.csv:text", "captions": "captions"},
    "train": {"steps": 1},
    "eval": {"metric": "mine.py:score"},
}
NAMES = ("model", "vae.pt", "weak", "style.safetensors", "mine.py", "table.csv", "captions")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A recipe's folder with every file, and another one, which is the working folder."""
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    recipes.mkdir()
    work.mkdir()
    for name in NAMES:
        (recipes / name).touch()
    monkeypatch.chdir(work)
    return recipes, work


def test_every_path_is_found_beside_the_recipe(folders):
    recipes, _ = folders
    tree = located(yaml.safe_load(yaml.safe_dump(TREE)), recipes / "mine.yaml")
    full = {name: str(recipes / name) for name in NAMES}
    assert tree["teacher"]["source"] == full["model"]
    assert tree["teacher"]["vae"] == full["vae.pt"]
    assert tree["teacher"]["guidance"]["weaker"] == full["weak"]
    files = [entry["file"] for entry in tree["teacher"]["adapters"]]
    assert files == [full["style.safetensors"], "absent.safetensors"]
    assert tree["objective"]["name"] == full["mine.py"] + ":Mine"
    assert tree["data"] == {"prompts": full["table.csv"] + ":text", "captions": full["captions"]}
    assert tree["eval"]["metric"] == full["mine.py"] + ":score"


def test_names_stay_although_files_are_called_so(folders):
    recipes, _ = folders
    for name in ("digits", "shapes", "pack", "analytic", "dmd2", "txt"):
        (recipes / name).touch()
    for value in ("digits", "shapes", "pack:starter", "analytic:gaussian", "/etc", "~/x", "", 3):
        assert beside(value, recipes) == value
    tree = {"objective": {"name": "dmd2"}, "data": {"source": "digits", "captions": "txt"}}
    assert located(tree, recipes / "mine.yaml") == {
        "objective": {"name": "dmd2"}, "data": {"source": "digits", "captions": "txt"}
    }  # fmt: skip


def test_several_shards_are_found_by_their_pattern(folders):
    recipes, _ = folders
    (recipes / "shards").mkdir()
    (recipes / "shards" / "0007.tar").touch()
    pattern = "shards/{0000..0099}.tar"
    assert beside(pattern, recipes) == str(recipes / pattern)
    assert beside("other/{0000..0099}.tar", recipes) == "other/{0000..0099}.tar"


def test_below_the_working_folder_a_path_is_short(folders, monkeypatch):
    recipes, _ = folders
    monkeypatch.chdir(recipes.parent)
    for folder in (recipes, Path("recipes")):  # however the recipe was named
        assert beside("vae.pt", folder) == "recipes/vae.pt"


def test_what_is_not_beside_the_recipe_and_what_the_command_gives_is_in_the_working_folder(folders):
    recipes, work = folders
    (work / "own.txt").touch()
    assert beside("own.txt", recipes) == "own.txt"
    tree = {"teacher": "digits", "objective": {"name": "dmd2"}, "train": {"steps": 1}}
    (recipes / "mine.yaml").write_text(yaml.safe_dump(tree))
    recipe = Recipe.load(recipes / "mine.yaml", ["teacher.vae=vae.pt"])
    assert recipe.teacher.vae == "vae.pt"


def test_the_recipe_in_a_run_is_read_as_it_is(folders):
    recipes, _ = folders
    (recipes / "checkpoints").mkdir()
    tree = {"objective": {"name": "mine.py:Mine"}}
    assert located(tree, recipes / "recipe.yaml")["objective"]["name"] == "mine.py:Mine"


@pytest.mark.parametrize("moved", [False, True])
def test_a_finished_runs_paths_are_looked_up_where_it_was_started(
    moved, folders, tmp_path, monkeypatch
):
    """Also where the run moved together with that folder."""
    start, work = folders
    monkeypatch.chdir(start)
    run = Path("runs/one")
    run.mkdir(parents=True)
    note_start(run)
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    here = from_start(yaml.safe_load(yaml.safe_dump(TREE)), run)
    assert here["data"] == tree["data"] and here["teacher"]["source"] == "model"
    monkeypatch.chdir(work)
    place = start
    if moved:
        place = start.rename(tmp_path / "elsewhere")
    found = from_start(tree, place / run)
    full = {name: os.path.normpath(place / name) for name in NAMES}
    files = [entry["file"] for entry in found["teacher"]["adapters"]]
    assert files == [full["style.safetensors"], str(start / "absent.safetensors")]
    assert found["teacher"]["source"] == full["model"]
    assert found["data"] == {"prompts": full["table.csv"] + ":text", "captions": full["captions"]}
    assert found["objective"]["name"] == full["mine.py"] + ":Mine"


def test_a_run_that_notes_no_start_is_read_as_it_is(folders):
    recipes, _ = folders
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    assert from_start(tree, recipes) == TREE
    (recipes / START).write_text('{"folder": 3}')
    assert from_start(tree, recipes) == TREE


def test_a_benchmark_finds_its_recipes_and_files(folders):
    recipes, _ = folders
    row = {"teacher": "digits", "objective": {"name": "dmd2"}, "train": {"steps": 1}}
    (recipes / "row.yaml").write_text(yaml.safe_dump(row))
    bench = {
        "budget": {"network_evaluations": 1000},
        "common": {"teacher": {"source": "digits", "vae": "vae.pt"}},
        "rows": [{"name": "a", "recipe": "row.yaml", "overrides": {"data": {"prompts": "model"}}}],
    }
    (recipes / "bench.yaml").write_text(yaml.safe_dump(bench))
    recipe = Bench.load(str(recipes / "bench.yaml")).reference()
    assert recipe.teacher.vae == str(recipes / "vae.pt")
    assert recipe.data.prompts == str(recipes / "model")
    assert recipe.objective["name"] == "dmd2"


@pytest.mark.parametrize("name", [n for n in shipped() if "orange" in n])
def test_a_shipped_recipe_finds_its_files_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = read_recipe(name)
    data = tree["data"]
    paths = (tree["teacher"]["adapters"][0]["file"], data["captions"], data["prompts"])
    for path in paths:
        assert Path(path).is_file() and Path(path).is_relative_to(SHIPPED.resolve())
