"""Plant faults in the code, one at a time, and see whether the tests named beside them fail.

    python benchmarks/mutants.py [--only NAME] [--jobs N] [--json FILE] [--markdown FILE]
    python benchmarks/mutants.py --json docs/results/mutants.json --markdown docs/mutants.md

Each fault is one that a person could make: a sign, a swap, a forgotten detach, an ignored key. For
each, the tree is copied to a temporary folder, the text is replaced, and the named tests run there.
Before that, every old text must occur exactly once in its file, and all named tests must pass on
an unchanged copy. It exits with 1 where fewer than 95 % of the faults are caught, and with 2 where
nothing could be said: a stale entry, tests that fail without a fault, a fault that is no Python.
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
LEAST = 0.95  # of all faults that must be caught
TIMEOUT = 240  # seconds for the tests of one fault; a fault that hangs them is caught
BASELINE = 1200  # seconds for all named tests on the unchanged tree
PRELOAD = [  # what tests spend their first seconds on; one that is not here is left out
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
LARGE = 2**17  # bytes; larger files are hard links and not copies


class Result(NamedTuple):
    """What became of a fault.

    status: "caught", "survived", or "broken" where no test could run.
    by: the first test that failed, or what went wrong.
    """

    name: str
    file: str
    status: str
    by: str
    seconds: float


class Stopped(Exception):
    """Nothing can be said of the tests; the message says why."""


def mutated(mutant: Mutant, root: Path) -> str:
    """The file's text with the fault in it.

    Raises:
        Stopped: the old text does not occur exactly once, or what comes out is no Python.
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
    found = []
    for mutant in mutants:
        try:
            mutated(mutant, root)
        except Stopped as error:
            found.append(str(error))
    return found


def copy(root: Path, into: Path) -> None:
    """The tree as git sees it, uncommitted changes included; large files are linked."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = root / name, into / name
        if not source.is_file():  # deleted, and not committed
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > LARGE:
            with suppress(OSError):  # another file system
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def tested(tree: Path, tests: Sequence[str], timeout: float, *options: str) -> tuple[int, str]:
    """Run tests in a tree, in a process of their own: pytest's exit status, and what it said.

    The status is -1 where the time ran out; all processes that the tests started are then ended.
    The process is forked from one that has read the packages of others, which saves most of the
    time that a few tests take; nothing of this project is read before the fork.
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
    """In the forked process: pytest in the tree, whose packages come before all others."""
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree), before]))
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest

    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *words]))


def failed(said: str) -> str:
    """The first test that failed, by its node id; nothing where none did."""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    return found[1] if found else ""


def last(said: str) -> str:
    """The last line of what a program said."""
    return (said.strip().splitlines() or ["it said nothing"])[-1]


def check_unchanged(mutants: Sequence[Mutant], root: Path) -> None:
    """Refuse tests that fail without a fault.

    Raises:
        Stopped: one does, or is not there.
    """
    tests = sorted({t for m in mutants for t in m.tests})
    with tempfile.TemporaryDirectory() as scratch:
        copy(root, Path(scratch))
        status, said = tested(Path(scratch), tests, BASELINE)
    if status:
        raise Stopped(f"without a fault, the tests fail: {failed(said) or last(said)}")


def tried(mutant: Mutant, root: Path) -> Result:
    """Plant a fault in a copy of the tree, and run its tests there."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        copy(root, tree)
        target, text = tree / mutant.file, mutated(mutant, root)
        target.unlink()  # it may be a link
        target.write_text(text, encoding="utf-8")
        status, said = tested(tree, mutant.tests, TIMEOUT, "-x")
    by = failed(said)
    if status == 0:
        kind = "survived"
    elif status == 1 and by:
        kind = "caught"
    elif status == -1:
        kind, by = "caught", "a timeout"
    else:
        kind, by = "broken", by or last(said)
    return Result(mutant.name, mutant.file, kind, by, round(time.monotonic() - began, 1))


def table(results: Sequence[Result]) -> str:
    """The page of docs that says what was caught, and by which test."""
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


def written(results: Sequence[Result]) -> str:
    """The results as JSON, without what differs from machine to machine."""
    rows = [{k: v for k, v in r._asdict().items() if k != "seconds"} for r in results]
    caught = sum(r.status == "caught" for r in results)
    return json.dumps({"caught": caught, "of": len(rows), "mutants": rows}, indent=1) + "\n"


def with_kept(results: Sequence[Result], mutants: Sequence[Mutant], file: Path) -> list[Result]:
    """The results of all faults: these, and for the others those that a file of results holds.

    Raises:
        Stopped: it does not hold them all.
    """
    found = {r.name: r for r in results}
    rows = json.loads(file.read_text(encoding="utf-8"))["mutants"] if file.is_file() else []
    kept = {r["name"]: Result(**r, seconds=0.0) for r in rows}
    if lost := [m.name for m in mutants if m.name not in found and m.name not in kept]:
        raise Stopped(f"--only: {file} holds no result of {lost[0]!r}; leave out --only once")
    return [found.get(m.name) or kept[m.name] for m in mutants]


def run(mutants: Sequence[Mutant], root: Path, jobs: int) -> list[Result]:
    """Try all faults, telling of each as it is done; the results are in the list's order."""
    say = sys.stdout.write
    with ThreadPoolExecutor(jobs) as pool:
        results = []
        for result in pool.map(lambda m: tried(m, root), mutants):
            say(f"{result.status:9}{result.seconds:6.1f} s  {result.name}  {result.by}\n")
            sys.stdout.flush()
            results.append(result)
    return results


def main(
    words: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT
) -> int:
    """The command; its exit status is 0 where enough faults were caught."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="this fault; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time")
    parser.add_argument(
        "--json", type=Path, help="where results go as JSON; with --only, the others' stay in it"
    )
    parser.add_argument("--markdown", type=Path, help="where results go as a page")
    args = parser.parse_args(words)
    if args.jobs < 1:
        parser.error(f"--jobs: {args.jobs}; give 1 or more")
    if args.only and args.markdown and not args.json:
        parser.error("--only: a page is of all faults; name the others' results by --json")
    if unknown := set(args.only or ()) - {m.name for m in mutants}:
        parser.error(f"--only: no fault is named {min(unknown)!r}; see the list in this file")
    chosen = [m for m in mutants if not args.only or m.name in args.only]
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        if lines := stale(mutants, root):
            raise Stopped("\n".join(lines))
        if args.only and args.json:  # are the others' there?
            with_kept([Result(m.name, m.file, "", "", 0.0) for m in chosen], mutants, args.json)
        check_unchanged(chosen, root)
    except Stopped as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results = run(chosen, root, args.jobs)
    if args.only and args.json:
        results = with_kept(results, mutants, args.json)
    if args.json:
        args.json.write_text(written(results), encoding="utf-8")
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
