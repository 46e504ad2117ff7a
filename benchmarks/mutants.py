"""Plant faults in the code, one at a time, and check that their tests fail.

    python benchmarks/mutants.py [--only NAME] [--jobs N] [--json FILE] [--markdown FILE]
    python benchmarks/mutants.py --json docs/results/mutants.json --markdown docs/mutants.md

The faults are ones that a person could make: a sign, a swap, a forgotten detach, an ignored key.
For each fault, the tree is copied to a temporary folder, the text is replaced, and its tests run
there. First, every old text must occur exactly once in its file, and all tests must pass on an
unchanged copy. Exit code 1 if fewer than 95 % of the faults are caught; 2 if an entry is out of
date, tests fail without a fault, or a fault is not valid Python.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from faults import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
LEAST = 0.95  # the share of faults that must be caught
TIMEOUT = 240  # seconds for the tests of one fault; a fault that makes them hang counts as caught
BASELINE = 1200  # seconds for all named tests on the unchanged tree
PRELOAD = [  # modules that tests import for seconds; missing ones are skipped
    "pytest",
    "torch._dynamo",
    "torchvision",
    "accelerate",
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "peft",
    "scipy.linalg",
]
LARGE = 2**17  # bytes; larger files are linked, not copied


class Result(NamedTuple):
    """The outcome of a fault.

    Attributes:
        status: "caught", "survived", or "broken" if no test could run.
        by: The first test that failed, or why no test could run.
    """

    name: str
    file: str
    status: str
    by: str
    seconds: float


class Stopped(Exception):
    """The faults cannot be tried; the message says why."""


def plant(mutant: Mutant, root: Path) -> str:
    """The file's text with the fault in it.

    Raises:
        Stopped: the old text does not occur exactly once, or the result is not valid Python.
    """
    path = root / mutant.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (n := text.count(mutant.old)) != 1:
        raise Stopped(
            f"{mutant.name}: stale: its old text occurs {n} times in {mutant.file}; give a text "
            "that occurs once"
        )
    new = text.replace(mutant.old, mutant.new)
    try:
        compile(new, mutant.file, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise Stopped(f"{mutant.name}: {mutant.file} would be no Python ({error.msg})") from None
    return new


def stale(mutants: Iterable[Mutant], root: Path = ROOT) -> list[str]:
    """A line for each fault that can no longer be planted."""
    lines = []
    for mutant in mutants:
        try:
            plant(mutant, root)
        except Stopped as error:
            lines.append(str(error))
    return lines


def copy(root: Path, into: Path) -> None:
    """Copy the files that git does not ignore; link large ones."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = root / name, into / name
        if not source.is_file():  # deleted without a commit
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > LARGE:
            with suppress(OSError):  # another file system
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def run_tests(tree: Path, tests: Sequence[str], timeout: float, *options: str) -> tuple[int, str]:
    """Run tests of a tree in a new process; return pytest's exit status and output.

    After the timeout the status is -1, and all processes that the tests started are killed. The
    process is forked from one that has imported the packages in PRELOAD, which saves most of the
    time; this project's modules are imported after the fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        process = context.Process(target=_pytest, args=(tree, log, [*options, *tests]))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            return -1, ""
        return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""


def _pytest(tree: Path, log: Path, words: list[str]) -> None:
    """Run pytest in the forked process, with the tree's packages before all others."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree), inherited]))
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest

    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *words]))


def first_failure(output: str) -> str:
    """The node id of the first test that failed; empty if none did."""
    match = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return match[1] if match else ""


def last_line(output: str) -> str:
    """The last line of a program's output."""
    return (output.strip().splitlines() or ["no output"])[-1]


def check_unchanged(mutants: Sequence[Mutant], root: Path) -> None:
    """Refuse tests that fail without a fault.

    Raises:
        Stopped: a test fails or does not exist.
    """
    tests = sorted({t for m in mutants for t in m.tests})
    with tempfile.TemporaryDirectory() as scratch:
        copy(root, Path(scratch))
        status, output = run_tests(Path(scratch), tests, BASELINE)
    if status:
        raise Stopped(
            f"without a fault, the tests fail: {first_failure(output) or last_line(output)}"
        )


def try_fault(mutant: Mutant, root: Path) -> Result:
    """Plant a fault in a copy of the tree, and run its tests there."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        copy(root, tree)
        target, text = tree / mutant.file, plant(mutant, root)
        target.unlink()  # it may be a hard link to the original
        target.write_text(text, encoding="utf-8")
        status, output = run_tests(tree, mutant.tests, TIMEOUT, "-x")
    by = first_failure(output)
    if status == 0:
        kind = "survived"
    elif status == 1 and by:
        kind = "caught"
    elif status == -1:
        kind, by = "caught", "a timeout"
    else:
        kind, by = "broken", by or last_line(output)
    return Result(mutant.name, mutant.file, kind, by, round(time.monotonic() - start, 1))


def table(results: Sequence[Result]) -> str:
    """docs/mutants.md: the outcome of every fault, and the test that caught it."""
    caught = sum(r.status == "caught" for r in results)
    lines = [
        "# Planted faults",
        "",
        "What the tests are worth is what they catch. `benchmarks/mutants.py` plants these faults",
        "one at a time in a copy of the tree and runs the tests that should fail; it writes this",
        "page:",
        "",
        "```bash",
        "python benchmarks/mutants.py --json docs/results/mutants.json --markdown docs/mutants.md",
        "```",
        "",
        f"Caught: {caught} of {len(results)}. A test of the suite checks that every fault can "
        "still be planted.",
        "",
        "| fault | file | outcome | first test that fails |",
        "|---|---|---|---|",
        *(
            f"| {r.name} | `{r.file}` | {r.status} | {f'`{r.by}`' if r.by else ''} |".replace(
                "tests/", ""
            )
            for r in results
        ),
    ]
    return "\n".join(lines) + "\n"


def to_json(results: Sequence[Result]) -> str:
    """The results as JSON, without the times, which differ from machine to machine."""
    rows = [{k: v for k, v in r._asdict().items() if k != "seconds"} for r in results]
    caught = sum(r.status == "caught" for r in results)
    return json.dumps({"caught": caught, "of": len(rows), "mutants": rows}, indent=1) + "\n"


def merge_results(results: Sequence[Result], mutants: Sequence[Mutant], file: Path) -> list[Result]:
    """The results of all faults: the new ones, and those of the other faults from a file.

    Raises:
        Stopped: the file lacks a result.
    """
    new = {r.name: r for r in results}
    rows = json.loads(file.read_text(encoding="utf-8"))["mutants"] if file.is_file() else []
    old = {r["name"]: Result(**r, seconds=0.0) for r in rows}
    if missing := [m.name for m in mutants if m.name not in new and m.name not in old]:
        raise Stopped(f"--only: {file} holds no result of {missing[0]!r}; leave out --only once")
    return [new.get(m.name) or old[m.name] for m in mutants]


def run(mutants: Sequence[Mutant], root: Path, jobs: int) -> list[Result]:
    """Try all faults and print each result as it comes; the results keep the list's order."""
    with ThreadPoolExecutor(jobs) as pool:
        results = []
        for result in pool.map(lambda m: try_fault(m, root), mutants):
            sys.stdout.write(
                f"{result.status:9}{result.seconds:6.1f} s  {result.name}  {result.by}\n"
            )
            sys.stdout.flush()
            results.append(result)
    return results


def arguments(words: Sequence[str] | None, mutants: Sequence[Mutant]) -> argparse.Namespace:
    """The parsed command line; a mistake in it exits with 2."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="one fault; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="how many faults to try at a time")
    parser.add_argument(
        "--json", type=Path, help="write results here; with --only, the others' stay in the file"
    )
    parser.add_argument("--markdown", type=Path, help="write the page of docs here")
    args = parser.parse_args(words)
    if args.jobs < 1:
        parser.error(f"--jobs: {args.jobs}; give 1 or more")
    if args.only and args.markdown and not args.json:
        parser.error("--only: a page is of all faults; name the others' results by --json")
    if unknown := set(args.only or ()) - {m.name for m in mutants}:
        parser.error(f"--only: no fault is named {min(unknown)!r}; see the list in faults.py")
    return args


def check(
    args: argparse.Namespace, chosen: Sequence[Mutant], mutants: Sequence[Mutant], root: Path
) -> None:
    """Refuse faults that cannot be planted, and a file that lacks the results of other faults.

    Raises:
        Stopped: naming them.
    """
    if lines := stale(mutants, root):
        raise Stopped("\n".join(lines))
    if args.only and args.json:
        placeholders = [Result(m.name, m.file, "", "", 0.0) for m in chosen]
        merge_results(placeholders, mutants, args.json)


def main(
    words: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT
) -> int:
    """The command; returns the exit code."""
    args = arguments(words, mutants)
    chosen = [m for m in mutants if not args.only or m.name in args.only]
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        check(args, chosen, mutants, root)
        check_unchanged(chosen, root)
    except Stopped as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results = run(chosen, root, args.jobs)
    if args.only and args.json:
        results = merge_results(results, mutants, args.json)
    if args.json:
        args.json.write_text(to_json(results), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table(results), encoding="utf-8")
    caught = sum(r.status == "caught" for r in results)
    sys.stdout.write(f"{caught} of {len(results)} caught\n")
    if broken := [r for r in results if r.status == "broken"]:
        sys.stderr.write(f"{broken[0].name}: no test could run ({broken[0].by})\n")
        return 2
    return 0 if caught >= LEAST * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
