"""Check that two revisions train students that are equal bit for bit.

    python benchmarks/same.py BEFORE AFTER [--steps 20]

BEFORE and AFTER are git revisions. Each is checked out in a temporary folder and trains a few steps
of each objective: a digits recipe, and a shapes recipe with adapters, on one CPU thread. The
students' weights are compared by SHA-256. Exit code 1 if any differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The old name of initial_steps, which revisions on both sides of the renaming read.
PROGRESSIVE = "objective={name: progressive, first: 8, stage_steps: %d}"
# Each name's recipe, and what is set in it beside the number of steps.
RUNS: dict[str, tuple[str, ...]] = {
    "digits, dmd2": ("digits/dmd2",),
    "digits, sid": ("digits/sid",),
    "digits, fdistill": ("digits/fdistill",),
    "digits, consistency": ("digits/consistency",),
    "digits, progressive": ("digits/progressive", PROGRESSIVE),
    "shapes, dmd2": ("shapes/dmd2-lora",),
    "shapes, sid": ("shapes/sid-lora",),
    "shapes, fdistill": ("shapes/fdistill-lora",),
    "shapes, consistency": ("shapes/consistency-lora",),
    "shapes, progressive": ("shapes/consistency-lora", PROGRESSIVE, "student.renoise=false"),
}


def digest(student: Path) -> str:
    """The SHA-256 of all weight files of an exported student, in the order of their names."""
    sha = hashlib.sha256()
    for path in sorted(student.rglob("*.safetensors")):
        sha.update(str(path.relative_to(student)).encode() + path.read_bytes())
    return sha.hexdigest()


def train(tree: Path, name: str, steps: int, out: Path) -> str:
    """Train a student with the checkout in `tree` and return its digest.

    Raises:
        CalledProcessError: the run failed; its message is on stderr.
    """
    recipe, *overrides = RUNS[name]
    stage = max(1, steps // 3)
    words = [word % stage if word == PROGRESSIVE else word for word in overrides]
    words += [f"train.steps={steps}", "train.sample_every=0", f"train.save_every={steps}"]
    words += ["eval.protocol=null", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "distill", "run", recipe, *words]
    subprocess.run(command, check=True, cwd=tree, env=env, stdout=subprocess.DEVNULL)
    return digest(out / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as place:
        trees = {}
        for side, revision in (("before", options.before), ("after", options.after)):
            tree = trees[side] = Path(place) / side
            words = ["git", "worktree", "add", "--quiet", "--detach", str(tree), revision]
            subprocess.run(words, check=True, cwd=ROOT)
        try:
            for name in RUNS:
                out = Path(place) / "runs" / name.replace(", ", "-")
                hashes = [
                    train(tree, name, options.steps, out.with_name(f"{out.name}-{side}"))
                    for side, tree in trees.items()
                ]
                verdict = "same" if hashes[0] == hashes[1] else "DIFFERS"
                differ |= hashes[0] != hashes[1]
                sys.stdout.write(f"{name:20} {hashes[0][:16]} {hashes[1][:16]} {verdict}\n")
                sys.stdout.flush()
        finally:
            for tree in trees.values():
                words = ["git", "worktree", "remove", "--force", str(tree)]
                subprocess.run(words, check=False, cwd=ROOT)
    sys.exit(differ)


if __name__ == "__main__":
    main()
