"""Several runs in one process, as in a notebook: each is what it is in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.weights import made, weights

ROOT = Path(__file__).parent.parent.parent
ALONE = """
import sys
from tests.helpers.weights import weights
from safetensors.torch import save_file
save_file(weights(*sys.argv[1:4]), sys.argv[4])
"""


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_runs_of_two_precisions_follow_one_another_in_a_process(pipelines, tmp_path):
    """fp32, bf16 and fp32 again in one process; bf16 alone in another."""
    teacher = str(pipelines["edm"])
    first = weights(teacher, "fp32", tmp_path / "a")
    half = weights(teacher, "bf16", tmp_path / "b")
    again = weights(teacher, "fp32", tmp_path / "c")
    assert same(first, again) and not same(first, half)
    file = tmp_path / "alone.safetensors"
    words = [teacher, "bf16", str(tmp_path / "d"), str(file)]
    subprocess.run([sys.executable, "-c", ALONE, *words], check=True, cwd=ROOT)
    assert same(half, load_file(file))


def test_a_run_keeps_its_precision_when_another_is_built_after_it(pipelines, tmp_path):
    teacher = str(pipelines["edm"])
    alone = weights(teacher, "fp32", tmp_path / "a")
    run = made(teacher, "fp32", tmp_path / "b")
    made(teacher, "bf16", tmp_path / "c")
    run.engine.train()
    assert run.engine.accelerator.mixed_precision == "no"
    assert same(alone, dict(run.student.state_dict()))
