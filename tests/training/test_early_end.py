"""Training that ends before its last step: its evaluations are flat, or its hours are over."""

import json
import math

import pytest

from distill.cli.train import goes_on
from distill.config.recipe import Recipe
from distill.config.schema import FlatSection
from distill.training import checkpoint
from tests.helpers.engines import assert_same, made
from tests.helpers.refusals import refused

FALLING = [10 * 0.97**n for n in range(40)]  # 9 % in three evaluations
SLOWLY = [10 * 0.995**n for n in range(40)]  # 1.5 %


def end_of(values, window=3, tolerance=0.02):
    """How many values are read until the rule says that they are flat; None if it never does."""
    rule = FlatSection(window=window, tolerance=tolerance)
    return next((n for n in range(len(values) + 1) if rule.reached(values[:n])), None)


def test_flat_is_a_median_that_is_not_below_the_median_before_by_the_tolerance():
    assert end_of([1.0] * 9) == 6  # twice the window
    assert end_of([1.0] * 9, window=2) == 4
    assert end_of([1.0] * 5) is None
    rule = FlatSection(window=3, tolerance=0.25)
    assert rule.reached([3.0, 1.0, 2.0, 1.5, 9.0, 0.0])  # medians 2 and 1.5: by 25 %
    assert not rule.reached([3.0, 1.0, 2.0, 1.49, 9.0, 0.0])


def test_values_that_fall_are_flat_only_where_they_fall_less_than_the_tolerance():
    assert end_of(FALLING) is None
    assert end_of(SLOWLY) == 6
    assert end_of(SLOWLY, tolerance=0.01) is None
    assert end_of(FALLING, tolerance=0.1) == 6  # 3 % an evaluation are 8.7 % in three
    assert end_of([-v for v in reversed(SLOWLY)], tolerance=0.01) is None  # a raised metric's


def test_noise_around_a_level_is_flat_and_noise_around_a_fall_is_not():
    noise = [math.sin(2.4 * n) for n in range(40)]
    level = [1 + 0.05 * v for v in noise]
    assert end_of(level) in range(6, 10)
    fall = [v * (1 + 0.02 * e) for v, e in zip(FALLING, noise, strict=True)]
    assert end_of(fall) is None


@pytest.mark.parametrize("place", range(6))
def test_one_outlier_neither_ends_training_nor_keeps_it_going(place):
    fall, level = FALLING[:6], [1.0] * 6
    for outlier in (100.0, 0.001):
        fall[place], level[place] = outlier, outlier
        assert end_of(fall) is None
        assert end_of(level) == 6


def engine_of(pipelines, out, resume=False, **train):
    """An engine whose evaluations fall to 1 at step 3, and are flat at step 5."""
    train = {"steps": 12, "save_every": 2, "log_every": 4, **train}
    engine = made("consistency", pipelines, out, resume, **train).engine
    engine.evaluate_every, engine.stop_when_flat = 1, FlatSection(window=2)
    engine.evaluate = lambda steps: {"headline": "fd", "fd": max(1.0, 4.0 - engine.step)}
    return engine


def test_a_run_ends_at_the_step_at_which_its_evaluations_are_flat(pipelines, tmp_path, capsys):
    engine = engine_of(pipelines, tmp_path / "run", sample_every=100)
    engine.train()
    assert (engine.step, engine.ended) == (6, "flat")
    assert engine.curve == [3.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert checkpoint.steps(engine.root)[-1].name == "step-000006"
    assert list((tmp_path / "run/samples").glob("step-000006-*"))  # as at any last step
    lines = [json.loads(v) for v in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [v["step"] for v in lines if "student/loss" in v] == [4, 6]
    out = capsys.readouterr().out
    assert "step 6: training ends: its evaluations improve no more" in out
    assert "step 6/6  student" in out and "left" not in out.split("training ends")[1]


def test_a_run_that_is_stopped_and_resumed_ends_at_the_same_step_with_the_same_weights(
    pipelines, tmp_path
):
    whole = engine_of(pipelines, tmp_path / "whole")
    whole.train()
    part = engine_of(pipelines, tmp_path / "part", steps=4)
    part.stop_when_flat = None
    part.train()
    resumed = engine_of(pipelines, tmp_path / "part", resume=True)
    assert resumed.curve == [3.0, 2.0, 1.0, 1.0]
    resumed.train()
    assert (resumed.step, resumed.ended) == (6, "flat")
    assert_same(whole, resumed)
    again = engine_of(pipelines, tmp_path / "part", resume=True)
    again.train()
    assert (again.step, again.ended) == (6, "flat")  # no step more


def test_a_failed_evaluation_is_left_out_of_the_curve(pipelines, tmp_path):
    engine = engine_of(pipelines, tmp_path / "run", steps=3)
    engine.evaluate = lambda steps: {"headline": "fd", "fd": [1.0, math.nan][engine.step % 2]}
    engine.train()
    assert engine.curve == [1.0]


def test_a_metric_that_training_raises_is_kept_with_the_other_sign(pipelines, tmp_path):
    engine = engine_of(pipelines, tmp_path / "run", steps=2)
    engine.evaluate = lambda steps: {"raised": "score", "score": 2.0 + engine.step}
    engine.train()
    assert engine.curve == [-3.0, -4.0]
    assert engine.best == -4.0
    about = checkpoint.about(engine.root / "best")
    assert (about["step"], about["score"]) == (2, 4.0)
    assert engine._evaluate() == "score 4.000 at 1 step"


def test_a_run_ends_at_the_first_logged_step_after_its_hours(pipelines, tmp_path):
    engine = made("consistency", pipelines, tmp_path / "run", steps=12, log_every=3).engine
    engine.cfg = engine.cfg.model_copy(update={"hours": 1e-9})
    engine.train()
    assert (engine.step, engine.ended) == (3, "hours")
    assert checkpoint.steps(engine.root)[-1].name == "step-000003"


def tree(**evaluation):
    return {
        "teacher": "digits", "objective": {"name": "consistency"}, "train": {"steps": 4},
        "data": {"source": "digits"}, "eval": evaluation,
    }  # fmt: skip


@pytest.mark.parametrize("section", [{}, {"protocol": "digits"}, {"every": 2}])
def test_flat_needs_a_measurement_in_training(section):
    with refused("eval.stop_when_flat", "set eval"):
        Recipe.check(tree(stop_when_flat={}, **section))
    assert Recipe.check(tree(stop_when_flat={}, protocol="digits", every=2))


def test_samples_are_of_a_metric_and_a_protocol_has_its_own():
    with refused("eval.samples", "512", "digits"):
        Recipe.check(tree(protocol="digits", samples=512))
    assert Recipe.check(
        tree(protocol="digits", samples=256)
    )  # the default, as resolved recipes say
    assert Recipe.check(tree(metric="mine.py:score", samples=512)).eval.samples == 512


SUMMARY = {"steps": 6, "wall_s": 60.0}


@pytest.mark.parametrize(
    ("ended", "train", "evaluation", "expected"),
    [
        ({}, {"steps": 6}, {}, False),
        ({}, {"steps": 7}, {}, True),
        ({"ended": "flat"}, {"steps": 7}, {"stop_when_flat": {}}, False),
        ({"ended": "flat"}, {"steps": 7}, {}, True),
        ({"ended": "hours"}, {"steps": 7, "hours": 0.01}, {}, False),
        ({"ended": "hours"}, {"steps": 7, "hours": 0.02}, {}, True),
        ({"ended": "hours"}, {"steps": 7}, {}, True),
    ],
)
def test_an_ended_run_goes_on_only_without_the_rule_that_ended_it(
    ended, train, evaluation, expected, tmp_path
):
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, **ended}))
    recipe = Recipe.check({**tree(protocol="digits", every=2, **evaluation), "train": train})
    assert goes_on(tmp_path, recipe) is expected
