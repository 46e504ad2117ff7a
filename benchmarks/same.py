"""Are students the same, bit for bit, before and after a change that should alter none?

    python benchmarks/same.py BEFORE AFTER [--steps 20]

BEFORE and AFTER are revisions of git. Each is checked out in a temporary folder and trains a few
steps of every objective's digits recipe and of an adapter recipe of the shapes, on one CPU thread.
Weights are compared by their SHA-256. Exit code 1 if any differ.
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
PROGRESSIVE = "objective={name: progressive, initial_steps: 8, stage_steps: %d}"
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
    """The SHA-256 of all weights in an exported student, by the files' names in order."""
    found = hashlib.sha256()
    for path in sorted(student.rglob("*.safetensors")):
        found.update(str(path.relative_to(student)).encode() + path.read_bytes())
    return found.hexdigest()


def trained(tree: Path, name: str, steps: int, out: Path) -> str:
    """The digest of a student that the checkout in `tree` trains.

    Raises:
        CalledProcessError: the run failed; what it said is on stderr.
    """
    recipe, *more = RUNS[name]
    stage = max(1, steps // 3)
    words = [word % stage if word == PROGRESSIVE else word for word in more]
    words += [f"train.steps={steps}", "train.sample_every=0", f"train.save_every={steps}"]
    words += ["eval.protocol=null", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "distill", "run", recipe, *words]
    subprocess.run(command, check=True, cwd=tree, env=env, stdout=subprocess.DEVNULL)
    return digest(out / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
                    trained(tree, name, options.steps, out.with_name(f"{out.name}-{side}"))
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
