"""A small benchmark, and what is kept of its figures."""

from concurrent.futures import Executor, Future
from dataclasses import asdict

import pytest
import yaml
from accelerate.state import AcceleratorState

from distill.benchmark import runner
from distill.benchmark import spec as benches
from distill.benchmark.spec import BenchmarkRunner
from distill.config.recipe import Recipe
from distill.evaluation.finish import finish
from distill.training.build import build
from distill.training.engine import Stopped
from teachers import UserError

BUDGET = 3000


TREE = {
    "budget": {"network_evaluations": BUDGET},
    "seeds": [0, 1],
    "common": {
        "teacher": "analytic:gaussian",
        "players": {"student": {"lr": 0.02}, "fake": {"lr": 0.04}},
        "train": {"batch": 16, "sample_every": 0, "save_every": 5, "log_every": 1},
    },
    "rows": [
        {"name": "DMD2", "overrides": {"objective": {"name": "dmd2", "student_every": 2}}},
        {"name": "SiD α = 1", "overrides": {"objective": {"name": "sid", "alpha": 1.0}}},
    ],
}


SPENT = ("wall_s", "peak_memory_gb")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


class Here(Executor):
    """Calls at once, in the main thread: signal handlers can be set in no other."""

    def __init__(self, jobs):
        pass

    def submit(self, function, *words):
        future = Future()
        try:
            future.set_result(function(*words))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def played(monkeypatch):
    """Runs take place in this process; the names of those that did."""
    names = []

    def play(self, entry):
        names.append(entry.name)
        AcceleratorState._reset_state(True)
        try:
            run = build(Recipe.load(entry.file), entry.folder, entry.folder.exists())
            run.engine.train()
            finish(run)
        except UserError as error:
            return str(error)
        except Stopped:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(BenchmarkRunner, "play", play)
    monkeypatch.setattr(benches, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(runner, "plot", lambda *_: [])
    return names


def figures(lines):
    """All of the lines that does not depend on the machine."""
    return [{k: v for k, v in asdict(line).items() if k not in SPENT} for line in lines]
