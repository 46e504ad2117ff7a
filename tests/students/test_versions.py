"""Exported students under the oldest and the newest diffusers that are claimed for them.

Drawing needs no such late diffusers as training: docs/sharing.md has both.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from students import schedulers
from students.export import folder as exporting
from students.lora import unwrap
from teachers import load
from tests.helpers import families, toys
from tests.helpers.disturbed import disturbed

pytestmark = pytest.mark.timeout(3000)  # pip builds two environments

# torch and what is not named here come from this process's environment.
OLDEST = ("diffusers==0.36.0", "transformers==4.57.1", "peft==0.17.0", "huggingface_hub==0.34.0",
          "tokenizers==0.22.0", "accelerate==1.10.0", "httpx<1")  # fmt: skip
NEWEST = ("diffusers", "transformers", "peft", "huggingface_hub", "tokenizers", "accelerate")
PINS = {"oldest": OLDEST, "newest": NEWEST}
CLOSE = 1e-5  # of a pixel's range, in float32
SAME_TIMES = 1e-6  # of σ, and of t over 1000
SIGMAS = [1.0, 0.9, 0.6, 0.2]  # as a user may pass them to a flow pipeline
# Each form of a student: its teacher's family, its step counts at most, whether it renoises.
STUDENTS = {
    "sd-lcm": ("sd", 4, True),
    "sd-ddim": ("sd", 4, False),
    "sd2-lcm": ("sd2", 2, True),
    "sdxl-lcm": ("sdxl", 4, True),
    "sdxl-ddim": ("sdxl", 2, False),
    "sd3-renoised": ("sd3", 4, True),
    "sd3-ode": ("sd3", 4, False),
    "sd3.5-ode": ("sd3.5", 2, False),
    "flux-dev-renoised": ("flux-dev", 4, True),
    "flux-dev-ode": ("flux-dev", 4, False),
    "flux-schnell-ode": ("flux-schnell", 2, False),
    "edm-consistency": ("edm", 4, True),
    "edm-euler": ("edm", 4, False),
    "ddpm-lcm": ("eps", 4, True),
    "ddpm-ddim": ("eps", 4, False),
    "ddpm-v-lcm": ("v", 2, True),
}

# Without our packages: the times of a student's scheduler by step count, and by sigmas=.
PROBE = """
import json
import diffusers, numpy as np

def times_of(folder, counts, given):
    index = json.load(open(folder + "/model_index.json"))
    kind = getattr(diffusers, index["scheduler"][1])
    scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    asked = {str(k): {"num_inference_steps": k} for k in counts}
    if "Flow" in kind.__name__:
        asked["sigmas"] = {"sigmas": given}
    times = {}
    for key, words in asked.items():
        scheduler.set_timesteps(**words)
        sigmas = getattr(scheduler, "sigmas", [])
        times[key] = [np.asarray(v, float).tolist() for v in (scheduler.timesteps, sigmas)]
    return times
"""
# All students in turn: their times, and their pictures by the script that checks exports.
DRIVER = """
import importlib.metadata, json, sys
jobs = json.load(open(sys.argv[1]))
exec(jobs["probe"])
times = {}
for name, job in jobs["students"].items():
    print("==", name, file=sys.stderr, flush=True)
    times[name] = times_of(job["folder"], job["request"]["counts"], jobs["sigmas"])
    sys.argv = ["-c", job["folder"], job["out"], json.dumps(job["request"])]
    exec(jobs["script"], {})
versions = {k: importlib.metadata.version(k) for k in jobs["packages"]}
json.dump([times, versions], open(jobs["times"], "w"))
"""


def built(name: str, root: Path) -> Path:
    """A Python with its own diffusers, and torch from here; FEWSTEP_TEST_OLDEST may name it."""
    if known := os.environ.get(f"FEWSTEP_TEST_{name.upper()}"):
        return Path(known)
    venv.create(root, with_pip=True)
    python = root / "bin" / "python"
    (site,) = root.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*pip, *PINS[name]], check=True)
    return python


def written(name, root, pipelines):
    """A student's folder, what is asked of it, and its own pictures."""
    family, steps, renoise = STUDENTS[name]
    path = root / name
    if family in toys.KINDS:
        source = pipelines[family]
        teacher = load(str(source), **({"null_label": 10} if family == "edm" else {}))
    else:
        source = root / family
        if not source.exists():
            families.build(family, source)
        teacher = load(str(source), **families.OPTIONS.get(family, {}))
    student = disturbed(schedulers.student(teacher, steps, None, renoise)).eval()
    with patch.object(exporting, "verify", lambda *_: None):
        exporting.export(student, teacher, path, {"objective": {"name": "none"}})
    prompts, arguments = exporting.request(student, teacher)
    request = {
        "counts": student.counts,
        "arguments": arguments,
        "absent": exporting.absent_parts(teacher),
        "device": "cpu",
        "own": False,
        "seeded": unwrap(student.denoiser).SEEDED,
    }
    ours = {k: exporting.pictures(student, teacher, k, prompts) for k in student.counts}
    return path, request, ours


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pipelines):
    root = tmp_path_factory.mktemp("students")
    return {name: written(name, root, pipelines) for name in STUDENTS}


@pytest.fixture(scope="module", params=PINS)
def drawn(request, exported, tmp_path_factory):
    """The pictures of all students, the times of their schedulers, and what was printed of each."""
    root = tmp_path_factory.mktemp(request.param)
    *results, versions = all_drawn(built(request.param, root / "environment"), exported, root)
    pins = [pin.split("==") for pin in PINS[request.param] if "==" in pin]
    assert {name: versions[name] for name, _ in pins} == dict(pins)
    return results


def all_drawn(python: Path, exported, root: Path):
    students = {
        name: {"folder": str(path), "out": str(root / name), "request": asked}
        for name, (path, asked, _) in exported.items()
    }
    times = root / "times.json"
    jobs = {"students": students, "times": str(times), "sigmas": SIGMAS, "packages": NEWEST,
            "script": exporting.SCRIPT, "probe": PROBE}  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(jobs))
    result = subprocess.run(
        [str(python), "-I", "-c", DRIVER, str(root / "jobs.json")],
        cwd=root, capture_output=True, text=True, check=False,
        env=exporting.child_environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    said = dict(part.split("\n", 1) for part in result.stderr.split("== ")[1:])
    return {k: load_file(root / k) for k in exported}, said, *json.loads(times.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_draws_the_same_pixels(name, drawn, exported):
    """Students of SD, SDXL, SD3, FLUX, EDM and DDPM under diffusers 0.36 and today's: to 1e-5."""
    pictures, said, _ = drawn
    ours = exported[name][2]
    assert {int(k) for k in pictures[name]} == set(ours)
    for steps, images in ours.items():
        gap = (pictures[name][str(steps)] - images).abs().max().item()
        assert gap <= CLOSE, f"{name} at {steps} steps: {gap:.2g}"
        assert images.std() > 0.01  # pictures of something
    assert "config attributes" not in said[name]  # of settings that are unknown there


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_scheduler_has_the_same_times(name, drawn, exported):
    """The times of their schedulers, by step count and by `sigmas=`, to 1e-6 of this process's."""
    _, _, times = drawn
    path, asked, _ = exported[name]
    scope = {}
    exec(PROBE, scope)
    ours = scope["times_of"](str(path), asked["counts"], SIGMAS)
    assert times[name].keys() == ours.keys() >= {str(k) for k in asked["counts"]}
    assert ("sigmas" in ours) == name.startswith(("sd3", "flux"))
    for key, (steps, sigmas) in ours.items():
        assert times[name][key][0] == pytest.approx(steps, abs=1000 * SAME_TIMES)
        assert times[name][key][1] == pytest.approx(sigmas, rel=SAME_TIMES, abs=SAME_TIMES)


@pytest.mark.slow
def test_a_setting_that_is_unknown_there_is_seen(exported, tmp_path):
    """The check that no setting is unknown can fail: it does for one that no diffusers has."""
    path, asked, ours = exported["sd-lcm"]
    copy = shutil.copytree(path, tmp_path / "copy")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_tomorrow": 1}))
    _, said, *_ = all_drawn(Path(sys.executable), {"sd-lcm": (copy, asked, ours)}, tmp_path)
    assert "config attributes" in said["sd-lcm"]
