"""The real command on every family: five steps, exported, summed up, and sampled from."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors.torch import load_file
from torchvision.utils import save_image

from teachers import load
from teachers.diagnosis.structure import dead_leaves
from teachers.families.base import Prompted
from tests.helpers import families, toys
from tests.helpers.command_line import called

UNET = "unet"  # a class-conditional UNet2D of pixels
NAMES = (*families.FAMILIES, UNET)
LABELLED = ("dit", UNET)
STEPS, BATCH = 5, 2
SLOW = pytest.mark.slow
SUMMARY = {
    "objective", "steps", "seed", "guidance", "wall_s", "network_evaluations",
    "network_evaluations_by_network", "metrics", "device", "processes", "versions",
    "peak_memory_gb", "failed",
}  # fmt: skip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Eight pictures: with captions beside them, and again in a folder for each of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(dead_leaves(8, 3, (40, 48))):
        for folder in (root / "captioned", root / "classes" / str(i % 2)):
            folder.mkdir(parents=True, exist_ok=True)
            save_image(image / 2 + 0.5, folder / f"{i}.png")
        (root / "captioned" / f"{i}.txt").write_text(f"leaves, picture {i}")
    (root / "prompts.txt").write_text("a red circle\ntwo boats on a lake\n")
    return root


@pytest.fixture
def folder(tmp_path):
    def build(name):
        if name == UNET:
            return toys.save_pipeline("eps", tmp_path / name)
        return families.build(name, tmp_path / name)

    return build


def tree(name, folder, objective, pictures):
    """A recipe of five steps; data where the objective learns from them, else prompts or labels."""
    if objective == "consistency":
        data = {"source": str(pictures / ("classes" if name in LABELLED else "captioned"))}
    else:
        data = {} if name in LABELLED else {"prompts": str(pictures / "prompts.txt")}
    return {
        "teacher": {"source": str(folder), **families.OPTIONS.get(name, {})},
        "student": {"steps": 2},
        "objective": {"name": objective, **({"student_every": 1} if objective == "dmd2" else {})},
        "adapters": {"rank": 4},
        "data": data,
        "train": {"steps": STEPS, "batch": BATCH, "sample_every": STEPS, "log_every": 1},
    }


def write(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


PAIRS = [(n, objective) for n in NAMES for objective in ("dmd2", "consistency") if n != "wan"]
PAIRS += [(n, "dmd2") for n in families.RECENT]


@SLOW  # each starts other processes
@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_five_steps_leave_a_student_that_draws(folder, name, objective, pictures, tmp_path, capsys):
    """The command on each family: five steps, an export, figures and pictures."""
    runs_and_draws(name, folder(name), objective, pictures, tmp_path, capsys)


@SLOW
def test_five_steps_on_prompts_leave_a_student_of_videos(folder, pictures, tmp_path, capsys):
    """The same of Wan, whose students draw videos."""
    drawn = runs_and_draws("wan", folder("wan"), "dmd2", pictures, tmp_path, capsys)
    assert drawn.shape == (2, 3, 5, 32, 32)


@SLOW
@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_adapters_on_rounded_weights_leave_files_that_fit_the_exact_ones(
    folder, precision, pictures, tmp_path, capsys
):
    """Adapters on bf16, fp8 and nf4 weights: their files fit the exact weights."""
    made = tree("sd", folder("sd"), "dmd2", pictures)
    made["teacher"]["precision"] = precision
    code, _, err = called(
        capsys, "run", write(tmp_path / "r.yaml", made), "--out", tmp_path / "run"
    )
    assert code == 0, err
    assert (tmp_path / "run/lora/pytorch_lora_weights.safetensors").exists()


def test_a_block_that_cannot_be_skipped_is_refused_before_anything_is_written(
    folder, pictures, tmp_path, capsys
):
    made = tree("sd", folder("sd"), "dmd2", pictures)
    made["teacher"]["guidance"] = {"scale": 2, "kind": "skip", "blocks": ["backbone.conv_in"]}
    capsys.readouterr()
    code, _, err = called(
        capsys, "run", write(tmp_path / "r.yaml", made), "--out", tmp_path / "run"
    )
    assert code == 2 and "teacher.guidance.blocks: a Conv2d does not return" in err
    assert not (tmp_path / "run").exists()


def test_learning_from_real_videos_is_refused(folder, pictures, tmp_path, capsys):
    recipe = write(tmp_path / "r.yaml", tree("wan", folder("wan"), "consistency", pictures))
    capsys.readouterr()  # what saving the teacher printed
    code, _, err = called(capsys, "run", recipe, "--out", tmp_path / "run")
    assert code == 2 and err.count("\n") == 1
    assert "data.source: consistency learns from real data" in err
    assert "makes videos" in err
    assert not (tmp_path / "run").exists()


def runs_and_draws(name, teacher, objective, pictures, tmp_path, capsys):
    """Train, and check all that a run leaves; what `distill sample` then draws."""
    recipe = write(tmp_path / "recipe.yaml", tree(name, teacher, objective, pictures))
    out = tmp_path / "run"
    code, _, err = called(capsys, "run", recipe, "--out", out)
    assert code == 0, err

    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == SUMMARY and summary["steps"] == STEPS
    counted = summary["network_evaluations_by_network"]
    assert counted["teacher"] == STEPS * BATCH * (2 if objective == "consistency" else 1)  # Heun's
    if objective == "dmd2":  # on the student's turn and on its own
        assert counted["fake"] == 2 * STEPS * BATCH
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["student/grad_norm"]) for line in lines)
    assert max(line["student/grad_norm"] for line in lines) > 0
    assert list((out / "samples").glob("step-000005-at-2.png"))

    part = "transformer" if (teacher / "transformer").is_dir() else "unet"
    file = f"{part}/diffusion_pytorch_model.safetensors"
    before, after = load_file(teacher / file), load_file(out / "student" / file)
    moved = [k for k in before.keys() & after.keys() if not same(before[k], after[k])]
    assert moved, "the exported student is its teacher"
    codec = load(str(teacher), **families.OPTIONS.get(name, {})).codec
    loads_lora = isinstance(codec, Prompted) and isinstance(codec.pipe, LoraBaseMixin)
    assert (out / "lora" / "pytorch_lora_weights.safetensors").exists() == loads_lora

    words = ["--labels", "0,1"] if name in LABELLED else ["--prompt", "a cat"]
    counts = json.loads((out / "student" / "fewstep.json").read_text())["steps"]
    drawn = tmp_path / "drawn.npz"
    asked = ["--steps", max(counts), "--n", 2, "--out", drawn, *words]
    code, _, err = called(capsys, "sample", out, *asked)
    assert (code, err) == (0, "")
    images = np.load(drawn)["images"]
    assert images.dtype == np.uint8 and len(images) == 2 and images.std() > 0
    assert (images[0] != images[1]).any()
    return images


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_a_process_of_a_group_ends_with_its_code_and_its_output():
    """Exit functions run and output is flushed, although the interpreter is not torn down."""
    program = (
        "import atexit, sys\n"
        "from distill.__main__ import exit_now\n"
        "atexit.register(lambda: print('exit function'))\n"
        "print('output', end=' ')\n"
        "exit_now(3)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "output exit function\n")
