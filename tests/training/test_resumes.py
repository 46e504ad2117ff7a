"""Runs that are taken up again where something is missing, full or in the way."""

import io
import json
import shutil

import pytest
import torch

from distill import console
from distill.cli.train import show
from distill.config.recipe import Recipe, read_yaml
from distill.training import build, checkpoint, run_folder
from tests.helpers.refusals import refused


def linear(steps=4):
    """A recipe of a closed-form teacher, whose run takes milliseconds."""
    train = {"steps": steps, "batch": 8, "log_every": 2, "save_every": 2, "sample_every": 0}
    tree = {"teacher": "analytic:gaussian", "objective": {"name": "dmd2"}, "train": train}
    return Recipe.check(tree, "recipe")


def test_a_checkpoint_that_the_disk_does_not_take_is_one_line_and_leaves_the_one_before(
    tmp_path, monkeypatch
):
    checkpoint.save({"x": torch.ones(3)}, tmp_path / "step-000001")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with refused("checkpoint */step-000002", "No"):
        checkpoint.save({"x": torch.ones(3)}, tmp_path / "step-000002")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.load(tmp_path / "step-000001")["x"].sum() == 3


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [Full, Gone])
def test_output_that_nobody_takes_does_not_stop_a_run(monkeypatch, stream):
    monkeypatch.setattr("sys.stdout", stream())
    out = console.PipeSafeConsole(markup=False)
    out.print("x")
    out.print("y")
    assert out.quiet


def test_names_in_square_brackets_are_printed_as_they_are(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "[" / "b]run[bold]"
    folder.mkdir(parents=True)
    summary = {"metrics": {}, "steps": 1, "wall_s": 1.0, "network_evaluations": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    show(folder)
    assert f"student in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 2}\ntrain: {steps: 3}\n", ("recipe */r.yaml", "train")),
        ("train: {steps: 2, steps: 3}\n", ("recipe */r.yaml", "steps")),
    ],
)
def test_a_key_that_comes_twice_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with refused(*message):
        read_yaml(tmp_path / "r.yaml")


def test_numbers_are_those_that_people_write(tmp_path):
    text = "[010, 1:30, 1e-4, 1_000, -3, 0, 2.5, .5, 1.e3, .inf, 0.30, 1:30.5]"
    (tmp_path / "r.yaml").write_text(f"x: {text}")
    found = read_yaml(tmp_path / "r.yaml")["x"]
    expected = ["010", "1:30", 1e-4, 1000, -3, 0, 2.5, 0.5, 1000.0, float("inf"), 0.3, "1:30.5"]
    assert found == expected
    assert [type(v) for v in found] == [type(v) for v in expected]


@pytest.mark.parametrize("name", ["", "."])
def test_a_recipe_without_a_name_is_refused(name):
    with refused("recipe '.'", "file"):
        Recipe.load(name)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("recipe.yaml/", ("--out", "recipe.yaml")),
        (".lock/", ("--out", "folder")),
        ("student", ("--out", "student")),
        ("checkpoints", ("--out", "checkpoints")),
    ],
)
def test_what_is_in_the_way_of_a_runs_files_is_named(tmp_path, place, message):
    if place.endswith("/"):
        (tmp_path / place).mkdir()
    else:
        (tmp_path / place).touch()
    with refused(*message):
        run_folder.check_places(tmp_path)


def test_a_link_to_nothing_is_no_place_for_a_run(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with refused("--out", "nothing"):
        run_folder.check_places(tmp_path / "run")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with refused("--out", "nothing"):
        run_folder.check_places(tmp_path / "loop")


def test_a_finished_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path):
    from distill.evaluation.finish import finish

    run = build.build(linear(), tmp_path / "run")
    run.engine.train()
    finish(run)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with refused("--resume", "checkpoints"):
        build.build(linear(6), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_resume_that_is_refused_changes_nothing(tmp_path):
    build.build(linear(), tmp_path / "run").engine.train()
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("x")
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with refused("checkpoint */run/checkpoints/step-000004", "damaged"):
        build.build(linear(6), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
