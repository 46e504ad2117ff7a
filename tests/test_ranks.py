"""Two processes are one process: the same weights after 20 steps, for each family."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toys import FIVE

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def trained(pipelines, tmp_path_factory) -> dict[int, Path]:
    """Folders of final weights, by the number of processes that made them."""
    folders = {}
    script = Path(__file__).parent / "ranks.py"
    for n in (1, 2):
        folder = folders[n] = tmp_path_factory.mktemp(f"ranks{n}")
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
        words = ["-m", *launcher, str(script)] if n == 2 else [str(script)]
        env = {**ENV, "PYTHONPATH": str(script.parent.parent)}
        result = subprocess.run(
            [sys.executable, *words, str(pipelines["edm"]), str(folder)],
            env=env,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
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
