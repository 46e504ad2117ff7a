"""Two processes are one process: the same weights after 10 steps, for each family."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.toys import FIVE

ROOT = Path(__file__).parent.parent.parent
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": str(ROOT),
}


def launch(n: int, *words) -> None:
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    command = [
        sys.executable,
        *(["-m", *launcher] if n == 2 else []),
        str(ROOT / "tests" / "helpers" / "ranks.py"),
    ]
    result = subprocess.run([*command, *map(str, words)], env=ENV, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(pipelines, tmp_path_factory) -> dict[int, Path]:
    """Folders of final weights, by the number of processes that made them."""
    folders = {}
    for n in (1, 2):
        folders[n] = tmp_path_factory.mktemp(f"ranks{n}")
        launch(n, pipelines["edm"], folders[n])
    return folders


@pytest.mark.parametrize("name", FIVE)
def test_two_processes_equal_one(name, trained):
    one = load_file(trained[1] / f"{name}-0.safetensors")
    two = load_file(trained[2] / f"{name}-0.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(
            two[key], value, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", FIVE)
def test_ranks_agree_to_the_bit(name, trained):
    first, second = (load_file(trained[2] / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_guards_stop_all_processes_at_one_step_with_the_best_student(trained):
    one = load_file(trained[1] / "guarded-0.safetensors")
    first, second = (load_file(trained[2] / f"guarded-{rank}.safetensors") for rank in (0, 1))
    assert first["steps"].tolist() == second["steps"].tolist() == [3, 2]
    for key, value in first.items():
        assert torch.equal(value, second[key])
        torch.testing.assert_close(value, one[key], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def stopped(trained) -> Path:
    """What two processes did when one of them, and not the other, was asked to stop."""
    return trained[2] / "stopped"


@pytest.mark.parametrize(
    ("signalled", "heard"), [(3, 4), (8, 8)], ids=["on the way", "on the last step"]
)
def test_a_signal_to_one_process_stops_all_within_a_step(stopped, signalled, heard):
    """A log step, where the processes meet anyway, is only the last."""
    found = [json.loads((stopped / f"{signalled}-{r}.json").read_text()) for r in (0, 1)]
    assert found == [{"signal": "SIGTERM", "step": heard}] * 2
    kept = [p.name for p in (stopped / str(signalled) / "checkpoints").iterdir()]
    assert kept == [f"step-{heard:06d}"]


@pytest.mark.parametrize(("why", "step"), [("flat", 4), ("hours", 2)])
def test_what_one_process_measures_ends_all_at_the_same_step(stopped, why, step):
    found = [json.loads((stopped / f"{why}-{r}.json").read_text()) for r in (0, 1)]
    curve = [1.0] * 4 if why == "flat" else []
    assert found == [{"ended": why, "step": step, "curve": curve}] * 2


@pytest.mark.slow
def test_two_processes_measure_as_one_and_say_it_once(tmp_path):
    """`distill eval` under a launcher, of a few pictures for each process."""
    tables, figures = [], []
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519", "-m"]
    for n in (1, 2):
        command = [sys.executable, "-m", *(launcher if n == 2 else []), "distill", "eval", "digits"]
        words = ["--steps", "1", "--seeds", "2", "--json", str(tmp_path / f"{n}.json")]
        env = {k: v for k, v in ENV.items() if k != "ACCELERATE_USE_CPU"}  # nobody told it so
        result = subprocess.run([*command, *words], env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        tables.append(result.stdout.count("teacher, 1 step"))
        found = json.loads((tmp_path / f"{n}.json").read_text())["teacher"]["1"]
        figures.append({k: v for k, v in found.items() if k != "images_per_s"})
    assert tables == [1, 1]
    assert figures[0] == figures[1]
