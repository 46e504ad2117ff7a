"""Guards: scores of known samples, and runs that stop at planted scores."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from distill.cli.train import goes_on
from distill.config.recipe import Recipe
from distill.config.schema import GuardsSection
from distill.early_stop import measurement, scores
from distill.early_stop.guards import Guards
from distill.early_stop.measurement import pictures_beside
from distill.evaluation.finish import summarise
from distill.training import build, checkpoint
from distill.training.engine import GUARDED
from tests.helpers.engines import assert_same, stream
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- scores


def test_spread_is_the_mean_distance_of_two_samples_of_a_prompt():
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])  # two prompts
    assert scores.spread(x) == pytest.approx((5 / 2**0.5 + 0) / 2)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_diversity_is_the_share_of_the_teachers_spread(share):
    teacher = normal(8, 6, 3, 4, 4, seed=0)
    student = share * normal(8, 6, 3, 4, 4, seed=1)
    assert scores.diversity(student, teacher) == pytest.approx(share, rel=0.03)


def test_more_variety_than_the_teachers_is_no_better_than_as_much():
    teacher = normal(4, 4, 16, seed=0)
    assert scores.diversity(2 * teacher, teacher) == 1.0


def test_matching_is_one_for_equal_distributions_and_falls_with_distance_and_with_collapse():
    teacher, other = (normal(16, 8, 64, seed=seed) for seed in (0, 1))
    assert scores.matching(other, teacher) == pytest.approx(1, abs=0.01)
    # In many dimensions, two samples are √2 apart and the mean is 1 from each: √2 / (2 · 1).
    assert scores.matching(torch.zeros_like(other), teacher) == pytest.approx(0.707, abs=0.02)
    # At distance 3 from each other: √2 / (2 √(2 + 9) - √2).
    assert scores.matching(other + 3, teacher) == pytest.approx(0.271, abs=0.01)


def test_nearest_is_the_share_of_the_teachers_distance_to_the_pictures():
    pictures = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    teacher = torch.tensor([[[0.0, 4.0], [10.0, 4.0]]])
    student = torch.tensor([[[0.0, 1.0], [10.0, 3.0]]])
    assert scores.nearest(student, teacher, pictures) == pytest.approx(0.5)
    assert scores.nearest(teacher + 1, teacher, teacher[0]) == 1.0  # of distance 0 there is no part


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_have_the_score_0(value):
    teacher, student = normal(4, 4, 16, seed=0), normal(4, 4, 16, seed=1)
    student[1, 2, 3] = value
    assert scores.diversity(student, teacher) == scores.matching(student, teacher) == 0
    assert scores.nearest(student, teacher, teacher[0]) == 0


def test_pictures_of_the_user_lie_beside_captions(tmp_path):
    for name in ("a.txt", "b.txt", "b.json"):
        (tmp_path / name).touch()
    for name in ("a.PNG", "b.jpg", "c.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    assert [p.name for p in pictures_beside(str(tmp_path))] == ["a.PNG", "b.jpg"]
    assert pictures_beside(str(tmp_path / "a.txt")) == pictures_beside(None) == []


def test_pictures_that_cannot_be_read_are_no_pictures(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.png").write_text("no picture")
    monkeypatch.setattr(measurement, "picture_shape", lambda teacher: (3, 4, 4))
    data = SimpleNamespace(captions=str(tmp_path), source=None)
    check = SimpleNamespace(recipe=SimpleNamespace(data=data), teacher=None)
    assert measurement.Measurement._pictures(check) is None


# ---- verdicts


def guards(**limits):
    return Guards(GuardsSection(**limits), dict)


def test_a_score_below_its_share_of_the_best_stops_and_the_best_check_is_kept():
    owner = guards(every=10)
    nan = float("nan")
    checks = [(0.6, 0.8), (0.9, 0.75), (0.95, 0.9), (0.9, 0.92), (0.84, 0.95)]
    best = [owner.judge(10 * (i + 1), {"diversity": d, "matching": m, "nearest": nan})
            for i, (d, m) in enumerate(checks)]  # fmt: skip
    assert best == [True, True, True, False, False]  # 0.95 · 0.9 is more than 0.9 · 0.92
    assert owner.step == 30
    assert owner.reason == "diversity is 0.840 at step 50, below 0.9 of its best, 0.950"


def test_a_limit_of_zero_is_logged_and_never_stops():
    owner = guards(every=1, diversity=0, matching=0.5)
    assert owner.judge(1, {"diversity": 1.0, "matching": 0.5})
    assert owner.judge(2, {"diversity": 0.1, "matching": 0.6})
    assert not owner.stopped
    assert owner.scores == {"diversity": 0.1, "matching": 0.6}


def test_checks_are_due_every_so_many_steps_from_the_start():
    owner = guards(every=4, start=7)
    assert [s for s in range(1, 17) if owner.due(s)] == [8, 12, 16]


def test_guards_need_the_average_that_they_keep(pipelines):
    tree = recipe_tree("dmd2", pipelines["edm"], ema=0, guards={})
    with refused("train.guards", 0):
        Recipe.check(tree)


# ---- runs


def run_of(pipelines, out, planted=None, resume=False, **train):
    """A run with guards at every step; `planted` are the diversities that they measure."""
    guards = train.pop("guards", {"every": 1, "prompts": 2, "samples": 2})
    tree = recipe_tree("dmd2", pipelines["edm"], guards=guards, **train)
    run = build.build(Recipe.check(tree), out, resume)
    if planted is not None and run.engine.guards is not None:
        run.engine.guards.measure = lambda: {"diversity": planted[run.engine.step - 1]}
    return run


PLANTED = [0.8, 1.0, 0.95, 0.6, 1.0]


def test_falling_diversity_stops_a_run_which_ends_with_its_best_student(pipelines, tmp_path):
    run = run_of(pipelines, tmp_path / "run", PLANTED, steps=5)
    run.engine.train()
    assert run.engine.step == 4 and run.engine.guards.step == 2
    short = run_of(pipelines, tmp_path / "short", guards=None, steps=5)
    data = stream(short.engine)
    for _ in range(2):
        short.engine.advance(data)
    data.close()
    for a, b in zip(run.engine.ema.mean, short.engine.ema.mean, strict=True):
        assert torch.equal(a, b)
    assert checkpoint.about(run.engine.root / GUARDED)["step"] == 2
    lines = [json.loads(v) for v in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    values = [v["guards/diversity"] for v in lines if "guards/diversity" in v]
    assert values == pytest.approx(PLANTED[:4])


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_stops_at_the_same_step_by_its_guards(pipelines, tmp_path):
    """Guards go on from what they had seen before the signal."""
    whole = run_of(pipelines, tmp_path / "whole", PLANTED, steps=5, save_every=1)
    whole.engine.train()
    first = run_of(pipelines, tmp_path / "run", PLANTED, steps=3, save_every=1)
    first.engine.train()
    again = run_of(pipelines, tmp_path / "run", PLANTED, resume=True, steps=5, save_every=1)
    again.engine.train()
    assert again.engine.guards.state_dict() == whole.engine.guards.state_dict()
    assert again.engine.step == 4
    after = run_of(pipelines, tmp_path / "run", PLANTED, resume=True, steps=5, save_every=1)
    after.engine.train()  # it has ended: no step is played
    assert after.engine.step == 4
    for a, b in zip(after.engine.ema.mean, whole.engine.ema.mean, strict=True):
        assert torch.equal(a, b)


def test_guards_that_do_not_stop_change_no_weight(pipelines, tmp_path):
    with_guards = run_of(pipelines, tmp_path / "guards", steps=2)
    with_guards.engine.train()
    found = with_guards.engine.guards.scores
    assert found.keys() == {"diversity", "matching"} and all(0 < v <= 1 for v in found.values())
    without = run_of(pipelines, tmp_path / "none", guards=None, steps=2)
    without.engine.train()
    with_guards.engine.guards = None
    assert_same(with_guards.engine, without.engine)


def test_a_failed_check_is_reported_and_training_goes_on(pipelines, tmp_path):
    run = run_of(pipelines, tmp_path / "run", [], steps=2)  # no planted score: an IndexError
    run.engine.train()
    assert run.engine.step == 2 and "guards" in run.engine.extras.failed


def test_the_summary_has_the_verdict_and_a_stopped_run_has_no_steps_left(pipelines, tmp_path):
    out = tmp_path / "run"
    run = run_of(pipelines, out, PLANTED, steps=5)
    run.engine.train()
    summary = summarise(run, {})
    (out / "summary.json").write_text(json.dumps(summary))
    assert summary["steps"] == 4 and summary["guards"]["step"] == 2
    assert summary["guards"]["reason"].startswith("diversity is 0.600")
    recipe = run.recipe
    assert not goes_on(out, recipe)
    train = recipe.train.model_copy(update={"guards": None})
    assert goes_on(out, recipe.model_copy(update={"train": train}))
