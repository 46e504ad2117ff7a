"""Benchmarks: many objectives at one budget, all else equal; `distill bench`.

Each row and seed is an ordinary run in its own process, under OUT/runs; its recipe is in
OUT/recipes. A finished run is not run again unless its row has changed.
"""

from __future__ import annotations

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

from distill.benchmark.state import STATE, states, whole
from distill.config.errors import explain
from distill.config.paths import beside, located
from distill.config.recipe import Recipe, find, override, read_recipe, read_yaml
from distill.config.renamed import current_names
from distill.config.schema import Section, TeacherSection
from distill.field_types import Positive, PositiveInt, Seed
from distill.files import stamps, write
from distill.sampling.baselines import Baseline
from distill.sampling.guided_teacher import guidance_of
from distill.training import run_folder
from teachers.errors import UserError

DECIDED = {  # keys that a benchmark sets itself, and from what
    "train.steps": "the step count comes from budget",
    "train.seed": "the seeds come from seeds",
}
OF_ROW = "# row "  # begins a recipe's file, before the hash of its row


class Budget(Section):
    """What every run may spend on training: network evaluations, or seconds."""

    network_evaluations: PositiveInt | None = None  # samples through any network
    seconds: Positive | None = None  # on this machine, timed while nothing else runs

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.network_evaluations is None) == (self.seconds is None):
            raise ValueError("input should be network_evaluations or seconds, one of the two")
        return self

    def check(self, recipe: Recipe) -> None:
        """Play the recipe's first step on networks that compute nothing.

        Raises:
            UserError: the recipe cannot be built, or the budget is below one step.
        """
        from distill.benchmark.budget import steps_for_evaluations

        steps_for_evaluations(recipe, self.network_evaluations or math.inf, most=1)

    def steps(self, recipe: Recipe) -> int:
        """The training steps that the budget allows."""
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
    """One contestant: a recipe, then `common` laid over it, then the row's own `overrides`."""

    name: Annotated[str, AfterValidator(_name)]
    recipe: str | None = None  # a file or a shipped recipe; by default an empty one
    overrides: dict[str, Any] = Field(default_factory=dict)  # a tree
    # Keys that are set to a fraction of the training steps, such as a stage's length or a warmup.
    shares: dict[str, Annotated[Positive, Field(le=1)]] = Field(default_factory=dict)


class Bench(Section):
    """A benchmark, written down."""

    budget: Budget
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (0, 1, 2)
    common: dict[str, Any]  # a recipe's tree: the teacher, data, protocol and settings of all rows
    rows: Annotated[tuple[Row, ...], MinLen(1)]
    baselines: tuple[Baseline, ...] = ()  # the teacher itself, without training

    @classmethod
    def load(cls, path: str, overrides: tuple[str, ...] | list[str] = ()) -> Bench:
        """Read a benchmark and check it and each row's recipe; nothing is built.

        Raises:
            UserError: one line with the key's path, what was expected, and the nearest valid name.
        """
        tree = override(located_bench(find(path)), overrides)
        if "objective" in tree and "rows" not in tree:
            raise UserError(f"{path}: it is a recipe of one run; use distill run")
        try:
            bench = cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error, cls)}") from None
        bench.check(path)
        return bench

    def check(self, path: str) -> None:
        """Refuse rows of one folder, seeds that are named twice, and rows that do not compare.

        Args:
            path: The benchmark's, as messages name it.

        Raises:
            UserError: naming the row or the key.
        """
        for a, b in combinations([row.name for row in self.rows], 2):
            if slug(a) == slug(b):
                raise UserError(
                    f"{path}: rows: {a!r} and {b!r} would share the folder {slug(a)!r}; rename one"
                )
        twice = next((v for v in self.seeds if self.seeds.count(v) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: seeds: {twice} is named twice; remove one")
        for where, tree in self.trees():
            if key := next((k for k in DECIDED if within(tree, k)), None):
                raise UserError(f"{path}: {where}: {key}: remove it; {DECIDED[key]}")
        first = self.reference()
        for row in self.rows:
            recipe = self.recipe(row, self.seeds[0])
            if recipe.teacher != first.teacher or recipe.eval.protocol != first.eval.protocol:
                raise UserError(
                    f"{path}: row {row.name!r}: its teacher or eval.protocol differs from the "
                    "first row's, and rows are compared; set both in common"
                )

    def trees(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The places in which a benchmark sets keys of recipes, and the trees of those keys."""
        yield "common", self.common
        for row in self.rows:
            yield f"row {row.name!r}: overrides", row.overrides
            for key in row.shares:
                yield f"row {row.name!r}: shares", override({}, [f"{key}=0"])

    def recipe(self, row: Row, seed: int, steps: int | None = None) -> Recipe:
        """The recipe of a row's run with this seed and so many training steps.

        Args:
            steps: By default the fewest in which all of the row begins.

        Raises:
            UserError: a key or a value is wrong, or the objective trains no student.
        """
        tree = {} if row.recipe is None else read_recipe(row.recipe)
        for above in (self.common, row.overrides):
            objective = tree.get("objective") or {}
            if not isinstance(objective, dict):
                raise UserError(
                    f"row {row.name!r}: objective: expected a section of keys, not {objective!r}; "
                    "write objective: {name: …}"
                )
            name = objective.get("name")
            tree = laid_over(tree, current_names(above, name))
        tree = deepcopy(tree)  # override changes it, and parts of it are common's
        steps = steps or fewest_steps(tree, row.shares)
        words = [f"train.seed={seed}", f"train.steps={steps}"]
        words += [f"{k}={math.ceil(v * steps)}" for k, v in row.shares.items()]
        recipe = Recipe.check(override(tree, words), f"row {row.name!r}")
        if not recipe.kind.few_step:
            name = recipe.objective["name"]
            raise UserError(
                f"row {row.name!r}: objective.name: {name} trains teachers; name one that trains "
                "students"
            )
        return recipe

    def reference(self) -> Recipe:
        """The first row's recipe, whose teacher and protocol all rows share."""
        return self.recipe(self.rows[0], self.seeds[0])


def located_bench(file: Path) -> dict[str, Any]:
    """The unchecked tree of a benchmark, with the recipes and paths that are beside its file."""
    tree = read_yaml(file)
    rows = tree.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            row["recipe"] = beside(row.get("recipe"), file.parent)
            if isinstance(overrides := row.get("overrides"), dict):
                located(overrides, file)
    if isinstance(common := tree.get("common"), dict):
        located(common, file)
    return tree


def within(tree: dict[str, Any], key: str) -> bool:
    """Whether a tree sets the key with this dotted path."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with `above` laid over it: sections are merged, values and lists replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = laid_over(old, value) if both else value  # pyright: ignore
    return merged


def fewest_steps(tree: dict[str, Any], shares: dict[str, float]) -> int:
    """The training steps in which every player and reward of an unchecked recipe begins."""
    if any(key.endswith(".begins") for key in shares):
        return 100
    sections = [tree.get(name) for name in ("players", "rewards")]
    parts = [v for s in sections if isinstance(s, dict) for v in s.values() if isinstance(v, dict)]
    begins = [v.get("begins") for v in parts]
    return 1 + max((v for v in begins if isinstance(v, int) and v > 0), default=0)


def slug(name: str) -> str:
    """A row's name as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "row"


@dataclass
class BenchmarkRun:
    """One run of a benchmark: a row with a seed, in the benchmark's folder `out`."""

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
        """Of all that decides what this run does, at the time that the benchmark starts.

        Of data it covers the name alone, since stamps of a large folder's files take too long.
        """
        recipe = self.bench.recipe(self.row, self.seed)
        files = teacher_files(recipe.teacher)
        if ":" in recipe.objective["name"]:
            files |= stamps(inspect.getfile(recipe.kind))
        budget = self.bench.budget.model_dump(mode="json")
        return digest([recipe.tree(), self.row.shares, budget, files])

    def written_row(self) -> str | None:
        """The row's hash in the recipe on the disk, if there is one."""
        if not self.file.is_file():
            return None
        return (
            self.file.read_text(errors="replace", encoding="utf-8")
            .partition("\n")[0]
            .removeprefix(OF_ROW)
        )

    def summary(self) -> dict[str, Any] | None:
        """The run's summary.json; None if it is not finished, or the file is damaged."""
        from distill.evaluation.finish import finished

        if not finished(self.folder):
            return None
        tree = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return tree if whole(tree) else None

    def steps(self) -> int:
        """The most steps whose cost is within the budget. Shares of the steps change the cost.

        Raises:
            UserError: the recipe cannot be built, or the budget is below one step.
        """

        def affordable(steps: int | None = None) -> int:
            return self.bench.budget.steps(self.bench.recipe(self.row, self.seed, steps))

        most = affordable()
        if not self.row.shares or self.bench.budget.seconds is not None:  # timing is not so exact
            return most
        while (more := affordable(most)) > most:  # shares of a single step are far off
            most = more
        low = most if more == most else 1
        while low < most:  # low steps are affordable; more than most are not
            middle = (low + most + 1) // 2
            if affordable(middle) >= middle:
                low = middle
            else:
                most = middle - 1
        return low

    def write_recipe(self) -> None:
        """Write the recipe, with the steps that the budget allows.

        Raises:
            UserError: the budget is below one step, or the recipe cannot be built.
        """
        steps = self.steps()
        tree = self.bench.recipe(self.row, self.seed, steps).tree()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write(self.file, f"{OF_ROW}{self.hash}\n{yaml.safe_dump(tree, sort_keys=False)}")


def teacher_files(section: TeacherSection) -> dict[str, list[int]]:
    """Stamps of the local files of a teacher, its weaker teacher, VAE and discriminator."""
    critic = None if section.discriminator is None else section.discriminator.file
    sources = (section.source, guidance_of(section).weaker, section.vae, critic)
    return {k: v for source in sources if source for k, v in stamps(source).items()}


def digest(tree: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


class BenchmarkRunner:
    """Runs a benchmark in a folder, which it locks.

    Raises:
        UserError: the folder cannot be written, or another benchmark or its run holds it.
    """

    def __init__(self, bench: Bench, out: Path) -> None:
        self.bench, self.out = bench, out
        try:
            out.mkdir(parents=True, exist_ok=True)
            # runs inherit the lock: one that outlives a killed benchmark still holds it
            self._lock = run_folder.locked(out, ", or a run that it started,")
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}; give another folder") from None
        self.entries = [
            BenchmarkRun(bench, row, seed, out) for row in bench.rows for seed in bench.seeds
        ]
        self.children: set[subprocess.Popen[str]] = set()
        self.stopping = False
        self.state: dict[str, dict[str, Any]] = {}
        if (out / STATE).exists():
            self.state = states(out / STATE)
        for entry in self.entries:  # without state.json, recipes tell which row a run is of
            if entry.name not in self.state and (row := entry.written_row()) is not None:
                self.state[entry.name] = {"row": row, "failed": None}

    def close(self) -> None:
        """Unlock the folder."""
        self._lock.close()

    def failure(self, entry: BenchmarkRun) -> str | None:
        """Why the run failed, if it did."""
        return self.state.get(entry.name, {}).get("failed")

    def done(self, entry: BenchmarkRun) -> bool:
        """Whether the run of this row, unchanged, has finished or failed."""
        state = self.state.get(entry.name, {})
        ended = state.get("failed") is not None or entry.summary() is not None
        return state.get("row") == entry.hash and ended

    def prepare(self, entry: BenchmarkRun) -> None:
        """Write the run's recipe, and delete what another row left under its name.

        Raises:
            UserError: the recipe cannot be built, or the budget is below one step.
        """
        state = self.state.get(entry.name, {})
        if state.get("row") == entry.hash and entry.file.exists():
            (entry.folder / "summary.json").unlink(missing_ok=True)  # a damaged one
            return
        shutil.rmtree(entry.folder, ignore_errors=True)
        entry.file.unlink(missing_ok=True)  # before state.json changes: a kill may come between
        self.note(entry, None)
        entry.write_recipe()

    def note(self, entry: BenchmarkRun, failed: str | None) -> None:
        """Save in state.json which row the run is of, and why it failed."""
        self.state[entry.name] = {"row": entry.hash, "failed": failed}
        write(self.out / STATE, json.dumps(self.state, indent=2) + "\n")

    def run(self, jobs: int = 1) -> Iterator[BenchmarkRun]:
        """Run what is not done yet, `jobs` at a time; yield each run when it has ended.

        Raises:
            KeyboardInterrupt: a run was stopped by a signal; all of them have saved a checkpoint.
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
                            failed = "summary.json has no distance, or it is not a finite number"
                        self.note(entry, failed)
                        yield entry
            except BaseException:
                self.stop()
                raise

    def play(self, entry: BenchmarkRun) -> str | None:
        """Run one in its own process; why it failed, if it did.

        Raises:
            KeyboardInterrupt: the run was stopped by a signal.
        """
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
            _, errors = child.communicate()
            self.children.discard(child)
            log.write(errors)
        if child.returncode == 0:
            return None
        if child.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        lines = [v for v in errors.splitlines() if v.strip()]
        lines = lines or [f"it ended with exit code {child.returncode} and printed no error"]
        return lines[-1].removeprefix("distill: ")

    def stop(self) -> None:
        """Signal every run to save and stop; the pool then waits for them."""
        self.stopping = True
        for child in list(self.children):
            child.terminate()
