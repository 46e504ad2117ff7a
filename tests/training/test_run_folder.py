"""One process at a time trains in a run's folder."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from distill.training.run_folder import LOCK, release, take
from tests.helpers.command_line import ENV, called
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    release(folder)


def other(out):
    """The lock as another process would hold it: opened apart, so that ours conflicts with it."""
    file = (out / LOCK).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("4242\n")
    file.flush()
    return file


def test_a_folder_is_taken_by_one_holder_until_it_lets_go(out):
    with other(out), refused("--out", "4242"):
        take(out)
    take(out)
    assert (out / LOCK).read_text() == f"{os.getpid()}\n"
    with (out / LOCK).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    release(out)
    with (out / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_who_holds_a_folder_may_take_it_again_even_made_anew(out):
    take(out)
    take(out)
    (out / LOCK).unlink()
    take(out)
    assert (out / LOCK).exists()


@pytest.fixture
def recipe(pipelines, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_tree("dmd2", pipelines["edm"])))
    return path


@pytest.mark.parametrize("words", [[], ["--resume"]], ids=["anew", "resumed"])
def test_a_run_in_a_folder_at_work_is_refused_in_one_line(recipe, out, words, capsys):
    with other(out):
        code, _, err = called(capsys, "run", recipe, "--out", out, *words)
    assert code == 2 and err.count("\n") == 1
    assert f"--out {out}: process 4242 is at work in it; wait for it, or give another" in err
    assert [p.name for p in out.iterdir()] == [LOCK]


@pytest.mark.slow
def test_a_killed_run_leaves_its_folder_free(recipe, out):
    """A run's folder is held while it runs, and is free once it is killed."""
    words = [sys.executable, "-m", "distill", "run", str(recipe), "--out", str(out)]
    lengthy = ["train.steps=100000", "train.save_every=2"]
    run = subprocess.Popen([*words, *lengthy], env=ENV, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if list(out.glob("checkpoints/step-*")):
                break
            time.sleep(0.1)
        with refused("--out", run.pid):
            take(out)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    take(out)
