"""Students of parts of the conditions as one pipeline: what it draws, and who makes one."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import DiffusionPipeline

from distill.config.recipe import Recipe
from distill.evaluation import route as routes
from distill.evaluation import subject
from students import schedulers
from students.export import folder
from students.routing import folder as routing
from teachers import load
from tests.helpers.command_line import called
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

HALVES = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def student(at, out, labels=None, seed=0, steps=2, words=None, **changes):
    """The folder of a student of two steps, with noise between them."""
    teacher = load(str(at))
    made = disturbed(schedulers.student(teacher, steps, None, True, None)).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=rng)
    tree = recipe_tree("sid", changes.pop("teacher", at))
    del tree["teacher"]["null_label"]
    where = {"labels": labels, "words": words}
    tree["data"]["where"], tree["student"] = where if labels or words else None, {"steps": steps}
    tree["data"] |= changes
    with patch.object(folder, "verify", lambda *_: None):
        folder.export(made, teacher, out, Recipe.check(tree).tree())
    return str(out)


@pytest.fixture(scope="module")
def halves(pipelines, tmp_path_factory):
    """Two students' folders, and their routed folder."""
    root = tmp_path_factory.mktemp("halves")
    made = [student(pipelines["cm"], root / f"{k}", HALVES[k], seed=k) for k in range(2)]
    with patch.object(routing, "verify", lambda *_: None):
        routes.route(made, root / "routed")
    return [*made, str(root / "routed")]


def pipe_at(place):
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_each_picture_is_its_own_students_whatever_else_is_in_the_batch(halves):
    labels, seeds = [7, 0, 9, 3], (11, 12, 13, 14)
    routed = pipe_at(halves[2])
    keys = {"num_inference_steps": 2, "output_type": "pt"}
    images = routed(class_labels=labels, generator=generators(*seeds), **keys).images
    for place, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        expert = DiffusionPipeline.from_pretrained(halves[label // 5])
        expert.set_progress_bar_config(disable=True)
        alone = expert(class_labels=[label], generator=generators(seed), **keys).images[0]
        assert (images[place] - alone).abs().max() < 1e-5
    one = routed(class_labels=9, generator=generators(13), **keys).images
    assert (one[0] - images[2]).abs().max() < 1e-5
    other = pipe_at(halves[0])(class_labels=[7], generator=generators(11), **keys).images[0]
    assert (other - images[0]).abs().max() > 1e-3  # the two students differ


def test_what_we_draw_is_what_the_pipeline_draws(halves):
    labels = [7, 0, 9, 3, 3]
    pipe, routed = pipe_at(halves[2]), routing.load(Path(halves[2]))
    for steps in (1, 2):
        keys = {"num_inference_steps": steps, "generator": generators(5)[0], "output_type": "pt"}
        theirs = pipe(class_labels=labels, **keys).images
        assert (routing.pictures(routed, labels, 5, steps, 2) - theirs).abs().max() < 1e-5
    for kind in ("np", "pil"):
        assert len(pipe(class_labels=labels, output_type=kind)[0]) == 5


def test_prompts_go_by_their_words(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red hat\na blue hat\nred shoes\n")
    keys = {"source": None, "prompts": str(tmp_path / "prompts.txt")}
    made = [
        student(folders("sd"), tmp_path / w, words=[w], seed=i, **keys)
        for i, w in enumerate(("blue", "red"))
    ]
    with patch.object(routing, "verify", lambda *_: None):
        routed = routes.route(made, tmp_path / "routed")
    pipe, prompts = pipe_at(str(tmp_path / "routed")), ["a red cup", "Blue and red", "RED"]
    keys = {"num_inference_steps": 2, "generator": generators(3)[0], "guidance_scale": 1.0}
    images = pipe(prompts, output_type="pt", **keys).images
    assert (routing.pictures(routed, prompts, 3, 2, 2) - images).abs().max() < 1e-4
    only_blue = routing.Routed([routed.experts[0]] * 2, routed.rule)
    apart = routing.pictures(only_blue, prompts, 3, 2, 2) - images
    assert [v.abs().max() > 1e-3 for v in apart] == [True, False, True]


def test_a_protocol_measures_them_as_one(halves):
    assert subject.is_student(halves[2])
    found = subject.student(halves[2], torch.device("cpu"))
    assert found.kind == "student" and found.counts == (1, 2)
    labels = ["7", "0", "9"]
    samples = found.sampler(labels, 2, None)(labels, 4)
    expected = routing.pictures(routing.load(Path(halves[2])), labels, 4, 2, 8)
    assert (samples.images / 255 - expected).abs().max() < 0.51 / 255


def test_the_rule_ships_in_json_and_no_label_of_nobody_is_drawn(halves):
    about = json.loads((Path(halves[2]) / "router.json").read_text())
    assert about["rule"] == {"by": "labels", "parts": HALVES} and about["steps"] == [1, 2]
    pipe = pipe_at(halves[2])
    with pytest.raises(ValueError, match="10"):
        pipe(class_labels=[3, 10])
    with pytest.raises(ValueError, match="prompt or class_labels"):
        pipe()
    with pytest.raises(ValueError, match="2 generators for 1"):
        pipe(class_labels=[3], generator=generators(1, 2))
    with refused("prompts", "label 10"):
        routing.load(Path(halves[2])).samples([10], 0, 2, 8)


@pytest.mark.slow
def test_another_process_without_our_packages_draws_the_same(halves, tmp_path, capsys):
    """The command, whose check starts a process that imports diffusers: 10 s."""
    out = tmp_path / "routed"
    code, shown, err = called(capsys, "route", *halves[:2], "--out", str(out))
    assert code == 0, err
    assert "labels 5, 6, 7, 8, 9" in shown and (out / "expert_1" / "fewstep.json").is_file()


def test_a_folder_that_draws_something_else_is_refused(halves, tmp_path, monkeypatch):
    def elsewhere(place, job, arguments, what):
        pipe, keys = pipe_at(str(place)), {"output_type": "pt", **arguments}
        draw = generators(1)[0]  # and not 0
        return {
            str(steps): pipe(num_inference_steps=steps, generator=draw, **keys).images
            for steps in job["counts"]
        }

    monkeypatch.setattr(routing, "drawn_apart", elsewhere)
    with pytest.raises(folder.ExportError, match="routed pipeline differs"):
        routes.route(halves[:2], tmp_path / "routed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"labels": HALVES[0]}], ["data.where", "5"]),
        ([{"labels": HALVES[0]}, {"labels": [4, *HALVES[1]]}], ["data.where.labels", "4"]),
        ([{"labels": HALVES[0]}, {"labels": [5, 6]}], ["data.where", "7"]),
        ([{"labels": HALVES[0]}, {"labels": None}], ["data.where"]),
        ([{"labels": HALVES[0]}, {"labels": HALVES[1], "steps": 1}], ["step counts"]),
        ([{"labels": HALVES[0]}, {"labels": HALVES[1], "teacher": "digits"}], ["teachers"]),
        ([{"labels": HALVES[0]}, {"labels": HALVES[1], "source": None}], ["data"]),
    ],
)
def test_students_that_make_no_whole_are_refused(changes, words, pipelines, tmp_path, capsys):
    made = []
    for number, change in enumerate(changes):
        made.append(student(pipelines["cm"], tmp_path / str(number), **change))
    code, _, err = called(capsys, "route", *made, "--out", str(tmp_path / "routed"))
    assert code == 2 and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "routed").exists()


def test_a_folder_in_the_way_and_one_that_is_no_student_are_refused(halves, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code, _, err = called(capsys, "route", *halves[:2], "--out", str(tmp_path))
    assert code == 2 and "--out" in err and (tmp_path / "file").read_text() == "mine"
    code, _, err = called(capsys, "route", str(tmp_path), "--out", str(tmp_path / "new"))
    assert code == 2 and str(tmp_path) in err
    code, _, err = called(capsys, "sample", halves[2], "--out", str(tmp_path / "a.png"))
    assert code == 2 and "several students" in err
    code, _, err = called(capsys, "eval", halves[2], "--speed")
    assert code == 2 and "--speed" in err
