"""Fresh environments with this package in them, and short runs to their end there.

    python benchmarks/environments.py plain FOLDER      # what `pip install -e .` gives today
    python benchmarks/environments.py oldest FOLDER     # the lowest version of every dependency

Each makes a virtual environment in FOLDER (torch alone is 6 GB), runs a few steps on the embedded
digits and shapes with the installed command, measures and reports one of them, and has the other
environment's students drawn where FOLDER holds both. `--on SITE_PACKAGES` takes torch and whatever
else is not pinned from another environment instead of downloading it.
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

# Draws a student with stock diffusers alone.
DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors.torch import save_file
logging.disable_progress_bar()
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
if hasattr(pipe, "tokenizer"):
    asked = {"prompt": ["two red circles on the left", "a blue square"], "guidance_scale": 1.0}
else:
    asked = {"batch_size": 4, "class_labels": [1, 2, 3, 4]}
torch.manual_seed(1)
rng = torch.Generator().manual_seed(0)
images = pipe(num_inference_steps=2, generator=rng, output_type="np", **asked).images
save_file({"images": torch.tensor(images).contiguous()}, sys.argv[2])
"""


def floors() -> list[str]:
    """Every dependency, pinned to the lowest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for line in project["dependencies"]:
        name, _, rest = line.partition(">=")
        found.append(f"{name}=={rest.partition(',')[0]}")
    return found


def environment(folder: Path, pins: list[str], on: Path | None = None) -> Path:
    """A virtual environment with this checkout installed; its folder of programs.

    Args:
        pins: Versions that are installed instead of the newest.
        on: Another environment's site-packages, for what is not pinned.

    Raises:
        CalledProcessError: pip could not install all of it, or found versions that do not agree.
    """
    programs = folder / "bin"
    if (programs / "distill").is_file():  # the last that is installed
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


def outside(folder: Path) -> dict[str, str]:
    """The variables of a user who has this package from nowhere but the environment."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(folder)}


def run_all(folder: Path, programs: Path) -> dict[str, Path]:
    """The short runs, each to its end; their folders.

    Raises:
        CalledProcessError: one did not come to its end.
        AssertionError: one left less than it should.
    """
    found = {}
    for words in (["--help"], ["run", "--help"], ["eval", "--help"]):
        command(folder, programs, *words)
    for name, recipe in RECIPES.items():
        out = found[name] = folder / f"run-{name}"
        shutil.rmtree(out, ignore_errors=True)  # of a call before
        command(folder, programs, "run", recipe, *SHORT, "--out", str(out))
        summary = json.loads((out / "summary.json").read_text())
        assert summary["failed"] == {}, summary["failed"]
        assert (out / "report.html").is_file() and (out / "student" / "README.md").is_file()
    assert all((found["shapes"] / "lora" / file).is_file() for file in LORA)
    figures = folder / "figures.json"
    words = ("eval", str(found["digits"]), "--protocol", "digits", "--seeds", "1", "--json")
    command(folder, programs, *words, str(figures))
    assert json.loads(figures.read_text())["protocol"] == "digits"
    command(folder, programs, "report", str(found["digits"]))
    return found


def command(folder: Path, programs: Path, *words: str) -> None:
    """`distill` as it was installed, from a folder where no checkout lies."""
    distill = [str(programs / "distill"), *words]
    subprocess.run(distill, check=True, cwd=folder, env=outside(folder))


def drawn(student: Path, folder: Path, programs: Path, out: Path) -> None:
    """A student's pictures by an environment's diffusers, in `out`."""
    words = [str(programs / "python"), "-c", DRAW, str(student), str(out)]
    subprocess.run(words, check=True, cwd=folder, env=outside(folder))


def apart(a: tuple[Path, Path], b: tuple[Path, Path], student: Path) -> float:
    """The largest difference of any pixel between two environments' pictures of one student."""
    from safetensors.torch import load_file

    images = []
    for folder, programs in (a, b):
        out = folder / "drawn.safetensors"
        drawn(student, folder, programs, out)
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
    found = run_all(folder, programs)
    other = folder.with_name("plain" if options.kind == "oldest" else "oldest")
    theirs = [other / f"run-{name}" for name in RECIPES]
    if all((run / "student").is_dir() for run in theirs):
        runs = [*found.values(), *theirs]
        for run in runs:
            gap = apart((folder, programs), (other, other / "bin"), run / "student")
            sys.stdout.write(f"{run}: drawn alike to {gap:.2g}\n")
            if gap > 1e-3:
                raise SystemExit(f"{run}: the two environments draw other pictures")
    sys.stdout.write(f"{options.kind}: every run came to its end in {folder}\n")


if __name__ == "__main__":
    main()
