"""Runs from a network of the user's own: objectives, resuming, metrics and data of one's own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.config.recipe import Recipe
from distill.evaluation.finish import finish
from distill.publish.card import card
from distill.report.page import report
from distill.training import build
from teachers import UserError
from tests.helpers import own
from tests.helpers.command_line import called
from tests.helpers.engines import assert_same

OBJECTIVES = {
    "sid": {},
    "fdistill": {"critic": {"blocks": ["backbone.extra"]}},
    "consistency": {},
    "progressive": {"objective": {"initial_steps": 2, "stage_steps": 2}},
    "dmd2": {"adapters": {"rank": 1, "targets": "extra"}},
}


def tree_of(file, objective, **changes):
    changes = {**OBJECTIVES.get(objective, {}), **changes}
    if objective in ("consistency", "progressive", "fdistill"):
        changes.setdefault("data", {"source": f"{file}:data"})
    return own.recipe_tree(file, objective, **changes)


def trained(tree, out, resume=False):
    run = build.build(Recipe.check(tree), out, resume)
    run.engine.train()
    return run


@pytest.mark.slow
def test_a_student_learns_the_distribution_that_is_known(tmp_path):
    """A student of the user's own network, beside its known law."""
    file = own.write(tmp_path)
    changes = {
        "players": {"student": {"lr": 1e-2, "decay": "linear"}},
        "train": {"steps": 300, "batch": 256, "ema": 0.98, "save_every": 300},
        "eval": {"metric": f"{file}:score", "samples": 2048, "seeds": 1},
    }
    run = trained(own.recipe_tree(file, "dmd2", **changes), tmp_path / "run")
    metrics = finish(run)["metrics"]
    assert metrics["teacher_few"]["1"]["std"] == pytest.approx(0.5 * 2**0.5, abs=1e-3)  # all at m
    assert metrics["teacher_few"]["1"]["evaluations"] == 1 and metrics["teacher"]["steps"] == 18
    assert metrics["student"]["1"]["std"] < 0.25 and metrics["student"]["1"]["mean"] < 0.15
    assert metrics["student"]["1"]["spread"].keys() == {"mean", "std"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["metric"] == f"{file}:score" and summary["failed"] == {}
    page = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "| student, 1 step | 1 |" in page
    for write in (card, report):  # these describe pipelines of diffusers
        with pytest.raises(UserError, match=r"network of your own.*README\.md"):
            write(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_resumes_bit_for_bit_and_exports(objective, tmp_path):
    file = own.write(tmp_path)
    tree = tree_of(file, objective)
    whole = trained(tree, tmp_path / "whole")
    tree["train"]["steps"] = 2
    trained(tree, tmp_path / "parts")
    tree["train"]["steps"] = 4
    again = trained(tree, tmp_path / "parts", resume=True)
    assert_same(again.engine, whole.engine)
    summary = finish(again)
    assert summary["failed"] == {} and (tmp_path / "parts" / "student" / "sampler.py").exists()


def test_a_critic_reads_sequences_by_their_channels(tmp_path):
    file = own.write(tmp_path, own.CONV)
    changes = {"data": {"source": f"{file}:data"}, "student": {"steps": 2, "counts": [1, 2]}}
    tree = tree_of(file, "dmd2", teacher="one", adapters=None, critic={}, **changes)
    run = trained(tree, tmp_path / "run")
    critic = run.engine.objective.critic
    assert critic.blocks == ("backbone.middle",)
    assert critic.heads[0][1].out.in_features == 8  # channels, and not places
    assert finish(run)["failed"] == {}


def test_checkpointing_and_grids_where_the_network_has_them(tmp_path):
    file = own.write(tmp_path, own.CONV)
    tree = tree_of(
        file, "sid", teacher="two", train={"steps": 1, "batch": 4, "checkpointing": True}
    )
    with pytest.raises(UserError) as refused:
        build.build(Recipe.check(tree), tmp_path / "run")
    assert refused.value.key == "train.checkpointing" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("metric", "part"),
    [
        ("none.py:score", "no such file"),
        ("{file}:scores", "did you mean 'score'"),
        ("{file}:data", "takes 0 positional"),
        ("{file}:teacher", "raised"),
        ("{file}:linear", "raised"),
        ("{file}:words", "returned str"),
        ("score", "file.py:function"),
        ("{file}:unknown", "is nan"),
        ("{file}:named", "'steps'"),
    ],
)
def test_metrics_that_give_no_number_are_refused_before_anything_is_written(
    metric, part, tmp_path, capsys
):
    text = own.FLOW + (
        "\n\ndef words(samples):\n    return 'good'\n"
        "\n\ndef unknown(samples):\n    return samples.mean() * float('nan')\n"
        "\n\ndef named(samples):\n    return {'steps': 1.0}\n"
    )
    file = own.write(tmp_path, text)
    tree = tree_of(file, "sid", eval={"metric": metric.format(file=file)})
    with pytest.raises(UserError, match=part) as refused:
        build.build(Recipe.check(tree), tmp_path / "run")
    assert refused.value.key == "eval.metric" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["teacher", "linear", "labels"])
def test_data_that_do_not_fit_are_refused(name, tmp_path):
    text = own.FLOW + "\n\ndef labels():\n    return torch.zeros(3, 2), [0]\n"
    file = own.write(tmp_path, text)
    tree = tree_of(file, "consistency", data={"source": f"{file}:{name}"})
    with pytest.raises(UserError) as refused:
        build.build(Recipe.check(tree), tmp_path / "run")
    assert refused.value.key == "data.source" and not (tmp_path / "run").exists()


def test_the_command_prints_the_metric(tmp_path, capsys):
    file = own.write(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    tree = tree_of(file, "sid", eval={"metric": f"{file}:score", "samples": 16, "seeds": 1})
    recipe.write_text(json.dumps(tree))
    code, out, err = called(capsys, "run", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    assert "student, 1 step" in out and "teacher, 18 heun steps" in out


@pytest.mark.slow
def test_a_compiled_network_exports(tmp_path):
    """A network that compiles itself leaves a student that draws."""
    torch._dynamo.reset()
    file = own.write(tmp_path)
    try:
        run = trained(tree_of(file, "sid", train={"compile": "blocks"}), tmp_path / "run")
    except UserError as error:
        pytest.skip(str(error))  # this machine cannot compile
    assert finish(run)["failed"] == {}


METRICS = """

def in_place(samples, reference):
    reference.zero_()
    torch.manual_seed(1)
    return samples.mul_(0).sum() + 1


def with_setting(samples, bins=10):
    return bins


def with_reference(samples, reference=None):
    return (samples - reference).norm()


def anything(*given):
    return len(given)


class Kept:
    def __call__(self, samples, *, bins=3):
        return bins


kept = Kept()
"""


def test_a_metric_gets_its_own_copies_and_keeps_its_settings(tmp_path):
    file = own.write(tmp_path, own.FLOW + METRICS)

    def metric(name):
        tree = tree_of(file, "sid", eval={"metric": f"{file}:{name}", "samples": 8})
        return build.build(Recipe.check(tree), tmp_path / name).metric

    spoiling = metric("in_place")
    samples, state = torch.ones(8, 2), torch.random.get_rng_state()
    before = spoiling.reference(0).clone()
    assert spoiling.numbers(samples, spoiling.reference(0)) == {"in_place": 1.0}
    assert torch.equal(spoiling.reference(0), before) and samples.sum() == 16
    assert torch.equal(torch.random.get_rng_state(), state)
    values = {k: metric(k).numbers(samples, samples) for k in
              ("with_setting", "with_reference", "anything", "kept")}  # fmt: skip
    assert [v for row in values.values() for v in row.values()] == [10.0, 0.0, 3.0, 3.0]


@pytest.mark.parametrize("values", ["torch.arange(size)", "torch.arange(size) + 0.5"])
def test_integers_and_frozen_parameters_stay_as_they_are(values, tmp_path):
    text = own.FLOW.replace(
        "self.size = size\n",
        f"self.size = size\n        self.places = nn.Parameter({values}, False)\n",
    ).replace("self.extra(x)", "(self.extra(x) + 0.1 * self.places)")
    assert text.count("self.places") == 2
    file = own.write(tmp_path, text)
    run = trained(own.recipe_tree(file, "dmd2"), tmp_path / "run")
    assert finish(run)["failed"] == {}
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    kind, more = (torch.float32, 0.5) if "0.5" in values else (torch.int64, 0)
    assert weights["places"].tolist() == [more, 1 + more] and weights["places"].dtype == kind


def test_a_script_that_switches_gradients_off_does_so_for_itself_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = own.FLOW.replace("SIZE = 2\n", "SIZE = 2\ntorch.set_grad_enabled(False)\n").replace(
        "    net = Net()\n",
        "    import os\n    os.chdir('/')\n    torch.set_default_dtype(torch.float64)\n"
        "    net = Net().float()\n",
    )
    file = own.write(tmp_path, text)
    run = trained(own.recipe_tree(file, "dmd2"), tmp_path / "run")
    assert run.engine.step == 4 and torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32 and Path.cwd() == tmp_path
