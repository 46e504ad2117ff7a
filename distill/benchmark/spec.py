"""Benchmarks: many objectives, one budget, the same everything else; `distill bench`.

Each row and seed is an ordinary run in a process of its own, under OUT/runs, of the recipe that is
left in OUT/recipes. What is finished is not run again, unless its row has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import MinLen
from pydantic import AfterValidator, Field, ValidationError, model_validator

from distill.benchmark.state import LOCK, STATE, states, whole
from distill.config.errors import explain
from distill.config.recipe import Recipe, find, override, read_yaml
from distill.config.renamed import current_names
from distill.config.schema import Section
from distill.field_types import Positive, PositiveInt, Seed
from distill.files import stamps, write
from distill.sampling.baselines import Baseline
from distill.sampling.guided_teacher import guidance_of
from teachers.errors import UserError

DECIDED = {"train.steps": "the budget", "train.seed": "seeds"}  # keys that a benchmark sets itself
OF_ROW = "# row "  # begins a kept recipe, before its row's hash


class Budget(Section):
    """What every run may spend on training: the one or the other."""

    network_evaluations: PositiveInt | None = None  # samples through any network
    seconds: Positive | None = None  # of this machine, timed alone

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.network_evaluations is None) == (self.seconds is None):
            raise ValueError("input should be network_evaluations or seconds, one of the two")
        return self

    def check(self, recipe: Recipe) -> None:
        """Play the recipe's first step, on networks that compute nothing.

        Raises:
            UserError: it cannot be built, or the budget does not buy it.
        """
        from distill.benchmark.budget import steps_for_evaluations

        steps_for_evaluations(recipe, self.network_evaluations or math.inf, most=1)

    def steps(self, recipe: Recipe) -> int:
        """The training steps that it buys."""
        from distill.benchmark.budget import steps_for_evaluations, steps_for_seconds

        if self.network_evaluations is not None:
            return steps_for_evaluations(recipe, self.network_evaluations)
        assert self.seconds is not None
        return steps_for_seconds(recipe, self.seconds)

    def __str__(self) -> str:
        if self.network_evaluations is not None:
            return f"{self.network_evaluations:,} network evaluations"
        return f"{self.seconds:g} seconds"


def _name(value: str) -> str:
    if not 1 <= len(value) <= 80 or not value.isprintable():
        raise ValueError("input should be 1 to 80 characters, none of them a control character")
    return value


class Row(Section):
    """One contestant: a recipe's tree, under what all share, under what is its own."""

    name: Annotated[str, AfterValidator(_name)]
    recipe: str | None = None  # a file or a shipped recipe; none is an empty one
    overrides: dict[str, Any] = Field(default_factory=dict)  # a tree, laid over all else
    # Keys that are set to a share of the training steps, such as a stage's length or a warmup.
    shares: dict[str, Annotated[Positive, Field(le=1)]] = Field(default_factory=dict)


class Bench(Section):
    """A benchmark, written down."""

    budget: Budget
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (0, 1, 2)
    common: dict[str, Any]  # a recipe's tree: teacher, data, protocol, and what all train by
    rows: Annotated[tuple[Row, ...], MinLen(1)]
    baselines: tuple[Baseline, ...] = ()  # the teacher itself, without training

    @classmethod
    def load(cls, path: str, overrides: tuple[str, ...] | list[str] = ()) -> Bench:
        """Read a benchmark and check all of it, each row's recipe as well; nothing is built.

        Raises:
            UserError: one line with the key's path, what was expected, and the nearest valid name.
        """
        tree = override(read_yaml(find(path)), overrides)
        if "objective" in tree and "rows" not in tree:
            raise UserError(f"{path}: it is a recipe of one run; distill run runs it")
        try:
            bench = cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error, cls)}") from None
        for a, b in combinations([row.name for row in bench.rows], 2):
            if slug(a) == slug(b):
                raise UserError(
                    f"{path}: rows: {a!r} and {b!r} would share the folder {slug(a)!r}; rename one"
                )
        twice = next((v for v in bench.seeds if bench.seeds.count(v) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: seeds: {twice} is named twice")
        for where, tree in bench.written():
            if key := next((k for k in DECIDED if within(tree, k)), None):
                raise UserError(f"{path}: {where}: {key} is not for it to say: {DECIDED[key]} does")
        first = bench.reference()
        for row in bench.rows:
            made = bench.recipe(row, bench.seeds[0])
            if made.teacher != first.teacher or made.eval.protocol != first.eval.protocol:
                raise UserError(
                    f"{path}: row {row.name!r}: its teacher or eval.protocol is not as the first "
                    "row's, and rows are compared; set both in common"
                )
        return bench

    def written(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where the benchmark itself sets keys of recipes, and the trees of those."""
        yield "common", self.common
        for row in self.rows:
            yield f"row {row.name!r}: overrides", row.overrides
            for key in row.shares:
                yield f"row {row.name!r}: shares", override({}, [f"{key}=0"])

    def recipe(self, row: Row, seed: int, steps: int = 1) -> Recipe:
        """What a row's run with this seed does, in so many training steps."""
        tree = {} if row.recipe is None else current_names(read_yaml(find(row.recipe)))
        # a copy, as what is set below must not be set in common, and so in other rows
        for above in (self.common, row.overrides):
            name = tree.get("objective", {}).get("name")
            tree = laid_over(tree, current_names(above, name))
        tree = deepcopy(tree)
        words = [f"train.seed={seed}", f"train.steps={steps}"]
        words += [f"{k}={math.ceil(v * steps)}" for k, v in row.shares.items()]
        recipe = Recipe.check(override(tree, words), f"row {row.name!r}")
        if not recipe.kind.few_step:
            name = recipe.objective["name"]
            raise UserError(f"row {row.name!r}: objective.name: {name} makes teachers")
        return recipe

    def reference(self) -> Recipe:
        """The recipe whose teacher and protocol all share: the first row's."""
        return self.recipe(self.rows[0], self.seeds[0])


def within(tree: dict[str, Any], key: str) -> bool:
    """Whether a tree sets the key of that path."""
    at: Any = tree
    for part in key.split("."):
        if not isinstance(at, dict) or part not in at:
            return False
        at = at[part]
    return True


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One tree with another laid over it: sections are merged, values and lists replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = laid_over(old, value) if both else value  # pyright: ignore
    return merged


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "row"


@dataclass
class BenchmarkRun:
    """One run of a benchmark: a row with a seed, and where it is kept."""

    bench: Bench
    row: Row
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{slug(self.row.name)}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def file(self) -> Path:
        return self.out / "recipes" / f"{self.name}.yaml"

    @cached_property
    def hash(self) -> str:
        """Of all that decides what this run does, as it was when the benchmark began.

        Data are known by their names alone: to look at each file of a large folder takes too long.
        """
        recipe = self.bench.recipe(self.row, self.seed)
        files = teacher_files(recipe)
        if ":" in recipe.objective["name"]:
            files |= stamps(inspect.getfile(recipe.kind))
        budget = self.bench.budget.model_dump(mode="json")
        return digest([recipe.tree(), self.row.shares, budget, files])

    def written(self) -> str | None:
        """The hash of the row whose recipe is on the disk, if one is."""
        if not self.file.is_file():
            return None
        return (
            self.file.read_text(errors="replace", encoding="utf-8")
            .partition("\n")[0]
            .removeprefix(OF_ROW)
        )

    def summary(self) -> dict[str, Any] | None:
        """What the run left, once it is finished; a damaged one counts for none."""
        from distill.evaluation.finish import finished

        if not finished(self.folder):
            return None
        found = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return found if whole(found) else None

    def steps(self) -> int:
        """The most steps whose cost, shares of so many being what they are, is in the budget.

        Raises:
            UserError: the recipe cannot be built, or the budget buys no step.
        """

        def bought(steps: int) -> int:
            return self.bench.budget.steps(self.bench.recipe(self.row, self.seed, steps))

        most = bought(1)
        if not self.row.shares or self.bench.budget.seconds is not None:  # timing is not so exact
            return most
        while (more := bought(most)) > most:  # the shares of a single step say little
            most = more
        low = most if more == most else 1
        while low < most:  # low can be paid for; more than most cannot
            middle = (low + most + 1) // 2
            if bought(middle) >= middle:
                low = middle
            else:
                most = middle - 1
        return low

    def write_recipe(self) -> None:
        """Leave the recipe, with the steps that the budget buys.

        Raises:
            UserError: the budget buys none, or the recipe cannot be built.
        """
        steps = self.steps()
        tree = self.bench.recipe(self.row, self.seed, steps).tree()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write(self.file, f"{OF_ROW}{self.hash}\n{yaml.safe_dump(tree, sort_keys=False)}")


def teacher_files(recipe: Recipe) -> dict[str, list[int]]:
    """Stamps of the local files that a recipe's teacher is made of."""
    sources = (recipe.teacher.source, guidance_of(recipe).weaker, recipe.teacher.vae)
    return {k: v for source in sources if source for k, v in stamps(source).items()}


def digest(tree: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


class BenchmarkRunner:
    """A benchmark under way in a folder, which only one may use at a time.

    Raises:
        UserError: the folder cannot be written, or another benchmark or its run is at work in it.
    """

    def __init__(self, bench: Bench, out: Path) -> None:
        self.bench, self.out = bench, out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = (out / LOCK).open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}; give another folder") from None
        try:  # runs inherit it: one that outlives a killed benchmark still holds it
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out {out}: a benchmark, or a run that it left behind, is at work there; "
                "wait for it to end, or give another folder"
            ) from None
        self.entries = [
            BenchmarkRun(bench, row, seed, out) for row in bench.rows for seed in bench.seeds
        ]
        self.children: set[subprocess.Popen[str]] = set()
        self.stopping = False
        self.state: dict[str, dict[str, Any]] = {}
        if (out / STATE).exists():
            self.state = states(out / STATE)
        for entry in self.entries:  # runs of a table that was deleted are known by their recipes
            if entry.name not in self.state and (row := entry.written()) is not None:
                self.state[entry.name] = {"row": row, "failed": None}

    def close(self) -> None:
        """Give the folder back."""
        self._lock.close()

    def failure(self, entry: BenchmarkRun) -> str | None:
        """Why the run failed, if it did."""
        return self.state.get(entry.name, {}).get("failed")

    def done(self, entry: BenchmarkRun) -> bool:
        """Whether the run has ended, well or not, and was of this very row."""
        known = self.state.get(entry.name, {})
        ended = known.get("failed") is not None or entry.summary() is not None
        return known.get("row") == entry.hash and ended

    def prepare(self, entry: BenchmarkRun) -> None:
        """Have the run's recipe on the disk, and nothing of another row of its name.

        Raises:
            UserError: the recipe cannot be built, or the budget buys no step.
        """
        known = self.state.get(entry.name, {})
        if known.get("row") == entry.hash and entry.file.exists():
            (entry.folder / "summary.json").unlink(missing_ok=True)  # a damaged one
            return
        shutil.rmtree(entry.folder, ignore_errors=True)
        entry.file.unlink(missing_ok=True)  # before its row is noted, or a kill would keep the old
        self.note(entry, None)
        entry.write_recipe()

    def note(self, entry: BenchmarkRun, failed: str | None) -> None:
        """Remember which row the run is of, and whether it failed."""
        self.state[entry.name] = {"row": entry.hash, "failed": failed}
        write(self.out / STATE, json.dumps(self.state, indent=2) + "\n")

    def run(self, jobs: int = 1) -> Iterator[BenchmarkRun]:
        """Run what is not done yet, `jobs` at a time, each entry given once it has ended.

        Raises:
            KeyboardInterrupt: a run was stopped from outside; all have saved where they were.
        """
        waiting = [e for e in self.entries if not self.done(e)]
        with ThreadPoolExecutor(jobs) as pool:
            running: dict[Future[str | None], BenchmarkRun] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        entry = waiting.pop(0)
                        try:
                            self.prepare(entry)
                        except UserError as error:
                            self.note(entry, str(error))
                            yield entry
                        else:
                            running[pool.submit(self.play, entry)] = entry
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        entry = running.pop(future)
                        failed = future.result()
                        if failed is None and entry.summary() is None:
                            failed = "its summary.json has no distance, or one that is no number"
                        self.note(entry, failed)
                        yield entry
            except BaseException:
                self.stop()
                raise

    def play(self, entry: BenchmarkRun) -> str | None:
        """One run in a process of its own; why it failed, if it did."""
        words = [sys.executable, "-m", "distill", "run", str(entry.file), "--out"]
        words += [str(entry.folder), *(["--resume"] if entry.folder.exists() else [])]
        logs = self.out / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{entry.name}.txt").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(
                words, stdout=log, stderr=subprocess.PIPE, text=True,
                pass_fds=[self._lock.fileno()],
            )  # fmt: skip
            self.children.add(child)
            if self.stopping:
                child.terminate()
            _, said = child.communicate()
            self.children.discard(child)
            log.write(said)
        if child.returncode == 0:
            return None
        if child.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        lines = [v for v in said.splitlines() if v.strip()]
        lines = lines or [f"it ended with exit code {child.returncode}, without a word"]
        return lines[-1].removeprefix("distill: ")

    def stop(self) -> None:
        """Ask every run to save and stop; the pool then waits for them."""
        self.stopping = True
        for child in list(self.children):
            child.terminate()
