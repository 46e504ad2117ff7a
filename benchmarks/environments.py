"""Install the package into fresh virtual environments and complete short runs there.

    python benchmarks/environments.py plain FOLDER      # the newest versions
    python benchmarks/environments.py oldest FOLDER     # the lowest version of every dependency

Each command makes a virtual environment in FOLDER (torch alone takes 6 GB). With the installed
command it trains a few steps on the shipped digits and shapes, then measures and reports one run.
If FOLDER holds both environments, each also generates images with the other's students, which must
agree. `--on SITE_PACKAGES` takes torch, and what is not pinned, from another environment instead of
downloading it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = ("train.steps=4", "train.batch=8", "train.log_every=2", "train.save_every=4",
         "train.sample_every=4", "eval.protocol=null")  # fmt: skip
RECIPES = {"digits": "digits/dmd2", "shapes": "shapes/consistency-lora"}
LORA = ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors")
HEAVY = ("torch", "torchvision")

# Generates images with a student, with diffusers alone.
DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors.torch import save_file
logging.disable_progress_bar()
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
if hasattr(pipe, "tokenizer"):
    condition = {"prompt": ["two red circles on the left", "a blue square"], "guidance_scale": 1.0}
else:
    condition = {"batch_size": 4, "class_labels": [1, 2, 3, 4]}
torch.manual_seed(1)
rng = torch.Generator().manual_seed(0)
images = pipe(num_inference_steps=2, generator=rng, output_type="np", **condition).images
save_file({"images": torch.tensor(images).contiguous()}, sys.argv[2])
"""


def floors() -> list[str]:
    """Every dependency, pinned to the lowest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = []
    for line in project["dependencies"]:
        name, _, rest = line.partition(">=")
        pins.append(f"{name}=={rest.partition(',')[0]}")
    return pins


def environment(folder: Path, pins: list[str], on: Path | None = None) -> Path:
    """Make a virtual environment with this checkout installed and return its `bin` folder.

    Args:
        pins: Versions to install instead of the newest.
        on: Another environment's site-packages, for what is not pinned.

    Raises:
        CalledProcessError: pip could not install everything, or the versions do not agree.
    """
    programs = folder / "bin"
    if (programs / "distill").is_file():  # it is installed last
        return programs
    if not programs.is_dir():
        venv.create(folder, with_pip=True)
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    if on is None:
        subprocess.run([*pip, "--editable", str(ROOT), *pins], check=True)
        subprocess.run([*pip[:-2], "check"], check=True)
        return programs
    (site,) = folder.glob("lib/python*/site-packages")
    light = [pin for pin in pins if pin.partition("==")[0] not in HEAVY]
    subprocess.run([*pip, "setuptools>=77", "httpx<1"], check=True)
    (site / "borrowed.pth").write_text(f"{on.resolve()}\n")
    with_source = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    subprocess.run([*pip, *with_source, *light], check=True)
    return programs


def variables(folder: Path) -> dict[str, str]:
    """Environment variables of a user who has the package only in this environment."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(folder)}


def run_all(folder: Path, programs: Path) -> dict[str, Path]:
    """Complete the short runs and return their folders by name.

    Raises:
        CalledProcessError: a run failed.
        AssertionError: a run lacks a result.
    """
    runs = {}
    for words in (["--help"], ["run", "--help"], ["eval", "--help"]):
        command(folder, programs, *words)
    for name, recipe in RECIPES.items():
        out = runs[name] = folder / f"run-{name}"
        shutil.rmtree(out, ignore_errors=True)  # of an earlier call
        command(folder, programs, "run", recipe, *SHORT, "--out", str(out))
        summary = json.loads((out / "summary.json").read_text())
        assert summary["failed"] == {}, summary["failed"]
        assert (out / "report.html").is_file() and (out / "student" / "README.md").is_file()
    assert all((runs["shapes"] / "lora" / file).is_file() for file in LORA)
    figures = folder / "figures.json"
    words = ("eval", str(runs["digits"]), "--protocol", "digits", "--seeds", "1", "--json")
    command(folder, programs, *words, str(figures))
    assert json.loads(figures.read_text())["protocol"] == "digits"
    command(folder, programs, "report", str(runs["digits"]))
    return runs


def command(folder: Path, programs: Path, *words: str) -> None:
    """Run the installed `distill` in a folder that holds no checkout."""
    distill = [str(programs / "distill"), *words]
    subprocess.run(distill, check=True, cwd=folder, env=variables(folder))


def generate(student: Path, folder: Path, programs: Path, out: Path) -> None:
    """Generate a student's images with an environment's diffusers, into `out`."""
    words = [str(programs / "python"), "-c", DRAW, str(student), str(out)]
    subprocess.run(words, check=True, cwd=folder, env=variables(folder))


def largest_gap(a: tuple[Path, Path], b: tuple[Path, Path], student: Path) -> float:
    """The largest pixel difference between two environments' images of one student."""
    from safetensors.torch import load_file

    images = []
    for folder, programs in (a, b):
        out = folder / "drawn.safetensors"
        generate(student, folder, programs, out)
        images.append(load_file(out)["images"])
    return (images[0] - images[1]).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=("plain", "oldest"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--on", type=Path, help="another environment's site-packages")
    options = parser.parse_args()
    folder = (options.folder / options.kind).resolve()
    programs = environment(folder, floors() if options.kind == "oldest" else [], options.on)
    runs = run_all(folder, programs)
    other = folder.with_name("plain" if options.kind == "oldest" else "oldest")
    theirs = [other / f"run-{name}" for name in RECIPES]
    if all((run / "student").is_dir() for run in theirs):
        for run in [*runs.values(), *theirs]:
            gap = largest_gap((folder, programs), (other, other / "bin"), run / "student")
            sys.stdout.write(f"{run}: images differ by at most {gap:.2g}\n")
            if gap > 1e-3:
                raise SystemExit(f"{run}: the images of the two environments differ")
    sys.stdout.write(f"{options.kind}: all runs completed in {folder}\n")


if __name__ == "__main__":
    main()
