"""Shared fixtures: small real pipelines on disk, and a fresh Accelerate state for each test.

And the one place that decides on which device tests run. FEWSTEP_TEST_DEVICE says so:

- `cpu`, the default: all tests run on the CPU, and so do the processes that they start. Numbers are
  compared to many digits, which GPUs do not agree on, so GPUs are hidden before torch looks.
- `cuda` (`make test-gpu`): the tests that follow the device run on the first GPU, those marked
  `device`; and those that need one, marked `gpu`. No others run.
- `fake`: the tests marked `device` run on `tests/helpers/fake_gpu.py`, which refuses on a CPU what
  a GPU would. `tests/training/test_fake_gpu.py` plays every objective there in any case.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEVICE = os.environ.get("FEWSTEP_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda", "fake"):
    raise pytest.UsageError(f"FEWSTEP_TEST_DEVICE={DEVICE}: give cpu, cuda or fake")
if DEVICE != "cuda":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
else:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS gives the same bits each time

import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from tests.helpers import fake_gpu, preloaded, remembered, slow_tests, toys  # noqa: E402

if DEVICE == "cuda":  # a run that is taken up again is compared bit for bit, values to the host's
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
elif torch.accelerator.is_available():  # one that no variable hides
    os.environ["ACCELERATE_USE_CPU"] = "true"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-slow",
        action="store_true",
        help="write the results of slow tests to docs/slow-tests.md, and keep its other rows",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-slow") and not hasattr(config, "workerinput"):  # xdist's workers
        config.pluginmanager.register(slow_tests.Recorder())
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("FEWSTEP_TEST_DEVICE=cuda: torch finds no GPU here")
    if DEVICE != "cuda" and torch.cuda.is_available():
        raise pytest.UsageError("the GPU was in use before tests could hide it")


# Files of half a minute and more. They come first, or at the end one worker would wait for another.
LONG = (
    "training/test_interruptions.py", "training/test_compiled.py", "planning/test_plan.py",
    "teachers/test_doctor_latents.py", "training/test_ranks.py", "training/test_devices.py",
    "project/test_gpu_benchmark.py", "cli/test_cli.py", "publish/test_push.py",
    "teachers/families/test_generic.py", "benchmark/test_big_benches.py",
    "benchmark/test_bench.py", "objectives/test_objectives.py", "project/test_docs.py",
)  # fmt: skip


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected is not searched for garbage again: a twelfth of the time.

    Some two million objects live as long as the process; and what tests leave is freed in fewer,
    larger collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first. Elsewhere than on the CPU, only tests run that are meant to."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))
    if DEVICE == "cpu":
        marks = {"gpu"}
        out = [item for item in items if item.get_closest_marker("gpu")]
    else:
        marks = {"device", "gpu"} if DEVICE == "cuda" else {"device"}
        out = [item for item in items if not any(map(item.get_closest_marker, marks))]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(0)


@pytest.fixture(autouse=DEVICE == "fake")
def gpu(_fresh_state, monkeypatch: pytest.MonkeyPatch):
    """The device to test on that is not the host: the GPU, or else a fake one, which Accelerate and
    all that asks for a device takes for the one to work on."""
    if DEVICE == "cuda":
        yield torch.device("cuda")
        return
    with fake_gpu.installed(monkeypatch):
        yield fake_gpu.GPU


@pytest.fixture(scope="session", autouse=True)
def networks_in_memory() -> Iterator[None]:
    """Networks that tests load again and again are read once."""
    with remembered.remembered():
        yield


@pytest.fixture(scope="session", autouse=DEVICE == "cpu")
def _preloaded():
    """Exports are checked in forks of one process that has imported diffusers."""
    with preloaded.checks():
        yield


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random UNet2D pipelines in the real on-disk format, by kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: toys.save_pipeline(kind, root / kind) for kind in toys.KINDS}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a family's small pipeline, by its name; built when it is first asked for."""
    from tests.helpers import families

    built: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in built:
            built[name] = str(families.build(name, tmp_path_factory.mktemp(name)))
        return built[name]

    return folder
