"""A run that is interrupted and resumed is the run left alone: the same bits, the same log.

A row is an objective and how its networks learn; a column is a way to be interrupted. Runs that the
command makes, and that are killed for good, are at the end.
"""

import json
import shutil
import signal
import time
from functools import cache

import numpy as np
import pytest
import yaml

from distill.config.objectives import OBJECTIVES
from distill.config.recipe import Recipe
from distill.training import build, checkpoint
from distill.training.engine import Stopped
from tests.helpers.command_line import command, launched, wait_for
from tests.helpers.engines import assert_same
from tests.helpers.toys import FIVE, recipe_tree

STEPS, SAVED = 5, 2  # checkpoints are of steps 2, 4 and 5
WAYS = {
    "weights": {},
    "adapters": {"adapters": {"rank": 4}},
    "offloaded": {"players": {k: {"optimizer": "adamw-offloaded"} for k in ("student", "fake")}},
}


class Killed(BaseException):
    """The process ends in the midst of a step."""


def stop(engine):
    """It ends after step 3, as if its recipe said so."""
    engine.cfg = engine.cfg.model_copy(update={"steps": 3})
    engine.train()
    return 3


def terminate(engine):
    """SIGTERM comes in the third step, which is finished and saved."""
    before, play = signal.getsignal(signal.SIGTERM), engine.play

    def interrupted(turn, place, stream):
        if engine.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return play(turn, place, stream)

    engine.play = interrupted
    with pytest.raises(Stopped) as stopped:
        engine.train()
    assert stopped.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.steps(engine.root)[-1].name == "step-000003"
    return 3


def kill(engine):
    """After the first turn of the fourth step: all since the checkpoint of step 2 is lost."""
    play = engine.play

    def interrupted(turn, place, stream):
        logs = play(turn, place, stream)
        if engine.step == 3:
            raise Killed
        return logs

    engine.play = interrupted
    with pytest.raises(Killed):
        engine.train()
    return 2


INTERRUPTIONS = {"stopped": stop, "SIGTERM": terminate, "killed": kill}
ROWS = [
    *((name, "weights", how) for name in (*FIVE, "ect") for how in ("stopped", "killed")),
    ("fdistill", "adapters", "SIGTERM"),
    ("dmd2", "adapters", "killed"),
    ("sid", "weights", "SIGTERM"),
    ("sid", "offloaded", "stopped"),
]


def log_of(out):
    """The last line of each step in a run's log, without what the machine's speed decides."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    machine = ("seconds", "speed/", "memory/")
    return {v["step"]: {k: x for k, x in v.items() if not k.startswith(machine)} for v in lines}


@pytest.fixture(scope="module")
def recipe(pipelines):
    def check(name, way):
        times = {"steps": STEPS, "save_every": SAVED, "keep": 3, "log_every": 1}
        tree = recipe_tree(name, pipelines["edm"], **times)
        return Recipe.check({**tree, **WAYS[way]})

    return check


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The engine of a run left alone, by its row; made when it is first needed."""

    @cache
    def trained(name, way):
        engine = build.build(recipe(name, way), tmp_path_factory.mktemp("whole") / "run").engine
        engine.train()
        return engine

    return trained


@pytest.mark.device
@pytest.mark.parametrize(("name", "way", "how"), ROWS)
def test_an_interrupted_run_that_goes_on_is_the_run_left_alone(
    name, way, how, recipe, whole, tmp_path
):
    left = INTERRUPTIONS[how](build.build(recipe(name, way), tmp_path / "run").engine)
    check_the_rest(whole(name, way), recipe(name, way), tmp_path / "run", left)


# One for each way to keep a state of an objective's own.
KEEP_STATE = {kind.state_dict: name for name, kind in reversed(OBJECTIVES.items())}


@pytest.mark.device
@pytest.mark.parametrize(
    "name",
    [
        name if name in KEEP_STATE.values() else pytest.param(name, marks=pytest.mark.slow)
        for name in OBJECTIVES
        if OBJECTIVES[name].trains == "student"  # else: sampling/test_discriminator.py
    ],
)
def test_a_run_of_adapters_that_has_lost_its_last_checkpoints_is_the_run_left_alone(
    name, recipe, tmp_path
):
    """What a checkpoint holds is all that a run of each objective goes on from."""
    alone = build.build(recipe(name, "adapters"), tmp_path / "alone").engine
    alone.train()
    run = shutil.copytree(alone.out, tmp_path / "run")
    for folder in checkpoint.steps(run / "checkpoints"):
        if folder.name != f"step-{SAVED:06d}":
            shutil.rmtree(folder)
    check_the_rest(alone, recipe(name, "adapters"), run, SAVED)


def check_the_rest(alone, recipe, out, left):
    """The run in `out` goes on after step `left`, and ends as the engine `alone` has."""
    rest = build.build(recipe, out, resume=True).engine
    assert rest.step == left
    rest.train()
    assert_same(alone, rest)
    log = log_of(rest.out)
    assert log == log_of(alone.out)
    assert set(log) == set(range(1, STEPS + 1))
    assert all("student/lr" in line for line in log.values())  # also before its turn has come


# ---- by the command, and for good


def final(out, steps):
    """The bytes of a run's last checkpoint and of its student."""
    state = out / f"checkpoints/step-{steps:06d}/state.safetensors"
    weights = out / "student/unet/diffusion_pytorch_model.safetensors"
    return state.read_bytes(), weights.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "kills", "steps"),
    [
        pytest.param("fdistill", 1, 24, marks=pytest.mark.slow),
        *(pytest.param(n, 5, 120, marks=pytest.mark.slow) for n in FIVE),
    ],
)
def test_kills_at_random_moments_change_no_bit(name, kills, steps, pipelines, tmp_path):
    """Five families, killed five times each: the same bits as of a run left alone."""
    path = tmp_path / "r.yaml"
    tree = recipe_tree(name, pipelines["edm"], steps=steps, save_every=3)
    if name == "progressive":
        tree["objective"]["stage_steps"] = 8
    path.write_text(yaml.safe_dump(tree))
    assert command("run", path, "--out", tmp_path / "whole").returncode == 0
    out, rng = tmp_path / "killed", np.random.default_rng(20 + len(name))
    for kill in range(kills):
        process = launched(path, out, *["--resume"] * out.exists())
        wait_for(out, "recipe.yaml")
        if kill == 0:  # at the latest once something is worth losing
            wait_for(out, "checkpoints/step-*")
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
    result = command("run", path, "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert final(out, steps) == final(tmp_path / "whole", steps)
