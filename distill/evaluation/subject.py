"""`distill eval`: students and teachers measured by a protocol, seed by seed, so that it can go on.

Several processes share each seed's chunks; what they find does not depend on how many they are.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from distill.config.errors import explain
from distill.config.recipe import Recipe
from distill.console import drawing, waiting
from distill.data.encode import encoders_on, picture_shape
from distill.files import stamps, write
from distill.publish.results_table import steps_of
from distill.sampling import speed
from distill.sampling.baselines import Baseline, Stock, StockEDM
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import check_protocol, student_samples
from distill.sampling.teacher_sampler import Sampler
from distill.sampling.timesteps import FINE, FOUND
from eval.metrics.perceptual import lpips, psnr
from eval.protocols.measure import PROTOCOLS, Draw, Protocol
from eval.stream import ALONE, Processes
from students.export.folder import SIDECAR, load_student
from teachers.denoiser import Denoiser
from teachers.errors import UserError, nearest
from teachers.quantised import Precision
from teachers.solver import SOLVERS
from teachers.storage.files import home, read_json
from teachers.teacher import EMBEDDED, Teacher

OPTIONS = {"threshold": "adaptive"}  # of `distill eval`, by a baseline's keys, where they differ
LPIPS_FROM = 64  # pixels; of smaller pictures LPIPS says nothing, and agreement is PSNR alone
AGREEING = 256  # pictures of which agreement is taken


@dataclass(frozen=True)
class Subject:
    """Something that draws pictures in a number of steps.

    Args:
        who: "student" or "teacher".
        counts: The step counts that it may be run in; None for any.
        draw: From prompts and a step count to a way of drawing; a third argument says how many go
            through the networks at once, None what their size allows.
        denoiser: What draws.
        about: All else that its figures depend on, in plain terms.
        most: The greatest step count that it may be run in; None for no limit.
        how: By what sampler, as tables have it; empty for a student's own.
    """

    who: str
    teacher: Teacher
    counts: tuple[int, ...] | None
    draw: Callable[[list[str], int, int | None], Draw]
    about: dict[str, Any]
    denoiser: Denoiser
    most: int | None = None
    how: str = ""

    def check(self, steps: Sequence[int]) -> None:
        """Refuse counts that it was not trained for, or that it has not times enough for.

        Raises:
            UserError: naming those that it was, or the most that it has.
        """
        if self.most is not None and max(steps) > self.most:
            raise UserError(f"--steps {max(steps)}: its times are chosen from {self.most}")
        if self.counts is not None and (wrong := sorted(set(steps) - set(self.counts))):
            known = ", ".join(map(str, self.counts))
            raise UserError(f"--steps {wrong[0]}: this student was trained for {known}")


def is_student(source: str) -> bool:
    """Whether a folder holds an exported student, or a run that left one."""
    folder = home(source)
    return any((folder / name / SIDECAR).is_file() for name in (".", "student"))


def usual_protocol(source: str) -> str:
    """The protocol that a student's run was measured by, or that is made for an embedded teacher.

    Raises:
        UserError: there is none.
    """
    folder, teacher, named = home(source), source, None
    for place in (folder / SIDECAR, folder / "student" / SIDECAR):
        if place.is_file():
            sidecar = read_json(place, f"student {source!r}")
            teacher, recipe = sidecar.get("teacher"), sidecar.get("recipe")
            named = recipe.get("eval") if isinstance(recipe, dict) else None
            named = named.get("protocol") if isinstance(named, dict) else None
    for name in (named, teacher):
        if name in PROTOCOLS:
            return name
    if not folder.exists() and source.count("/") != 1:
        raise UserError(f"{source}: no such folder, and no embedded teacher; "
                        f"{nearest(source, EMBEDDED)}")  # fmt: skip
    raise UserError(
        f"--protocol is missing: {source} has none of its own; {nearest('', PROTOCOLS)}"
    )


def refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options of `teacher` that are not what they are when they are left out.

    Raises:
        UserError: naming the first of them.
    """
    left_out = {k: p.default for k, p in inspect.signature(teacher).parameters.items()}
    if wrong := next((k for k, v in options.items() if v != left_out[k]), None):
        raise UserError(f"--{wrong.replace('_', '-')}: {why}")


def student(source: str, device: torch.device, precision: Precision | None = None) -> Subject:
    """An exported student, drawing what stock diffusers would.

    Args:
        precision: Of its weights; by default single.

    Raises:
        UserError: it is none, or is damaged.
    """
    folder = home(source)
    generator, teacher = load_student(folder, precision)
    generator = generator.to(device)

    def draw(prompts: list[str], steps: int, batch: int | None) -> Draw:
        few = generator.at(steps)
        return lambda some, seed: student_samples(few, teacher, some, seed, batch)

    about = {"files": stamps(str(folder)), "precision": precision}
    return Subject("student", teacher, generator.counts, draw, about, generator.denoiser)


def teacher(
    source: str,
    device: torch.device,
    solver: str = "heun",
    guidance: float = 1.0,
    null_label: int | None = None,
    schedule: str = "own",
    adaptive: float | None = None,
    cache: int = 1,
    precision: Precision | None = None,
) -> Subject:
    """Whatever may be `teacher.source` in a recipe, by one of our solvers or diffusers' schedulers.

    Args:
        adaptive: The cosine at which guidance stops; None for guidance in all steps.
        schedule, cache: As a benchmark's baselines have them.

    Raises:
        UserError: it is no teacher, or cannot be guided or sampled so.
    """
    schedulers = {*get_args(Stock), *get_args(StockEDM)}
    if solver not in SOLVERS and solver not in schedulers:
        raise UserError(
            f"--solver {solver!r} is unknown: {nearest(solver, [*SOLVERS, *schedulers])}"
        )
    told = {"source": source, "guidance": guidance, "null_label": null_label}
    told["precision"] = precision
    nothing = {"objective": {"name": "sid"}, "train": {"steps": 1}}  # only the teacher is built
    recipe = Recipe.check({"teacher": told, **nothing}, "eval")
    found = load_teacher(recipe.teacher)
    found.denoiser.to(device)
    kind = "solver" if solver in SOLVERS else "scheduler"
    tree: dict[str, Any] = {kind: solver, "schedule": schedule, "cache": cache}
    if adaptive is not None:
        tree |= {"guidance": "adaptive", "threshold": adaptive}
    try:
        baseline = Baseline.model_validate(tree)
    except ValidationError as error:
        key, _, said = explain(error, Baseline).partition(": ")
        where = f"--{OPTIONS.get(key, key)}" if key else "eval"
        raise UserError(f"{where}: {said}") from None
    baseline.check(recipe, found, f"eval: {baseline.name}")

    @lru_cache
    def drawing(prompts: tuple[str, ...], steps: int, batch: int | None) -> Sampler:
        return baseline.draw(recipe, found, prompts, steps, batch)

    def draw(prompts: list[str], steps: int, batch: int | None) -> Draw:
        return drawing(tuple(prompts), steps, batch)  # its schedule is found once for all seeds

    most = FINE if schedule in FOUND else None
    about = {**told, **tree, "files": stamps(source)}
    return Subject("teacher", found, None, draw, about, found.denoiser, most, baseline.name)


def evaluate(
    found: Subject,
    measure: Protocol,
    steps: Sequence[int],
    seeds: int,
    processes: Processes = ALONE,
    record: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The figures at each step count, by its name.

    Args:
        record: Where the figures of each finished seed are kept, so that a call that was cut off
            goes on from there. They count only for the same subject and protocol.

    Raises:
        UserError: the protocol is not for such pictures.
        MetricError: a figure cannot be given.
    """
    check_protocol(measure, found.teacher)
    measure.check()
    about = {"protocol": measure.name, "n": len(measure.prompts), "who": found.who, **found.about}
    known = recall(record, about)
    results = {}
    for k in steps:
        for seed in range(seeds):
            if (place := f"{k}/{seed}") in known:
                continue
            task = f"{found.who} in {k}: seed {seed}, {len(measure.prompts):,} pictures"
            with drawing(task, len(measure.prompts) / processes.count) as told:
                draw = found.draw(measure.prompts, k, None)
                known[place] = measure.once(draw, seed, processes, record, [about, k], told)
            if record is not None and processes.rank == 0:
                write(record, json.dumps({"about": about, "figures": known}, indent=2) + "\n")
        results[str(k)] = measure.over([known[f"{k}/{seed}"] for seed in range(seeds)])
    return results


def shown(found: Subject, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by their names in tables, with what a picture costs."""
    how = f" of {found.how}" if found.how else ""
    return {
        f"{found.who}, {steps_of([k])}{how}": {"evaluations": float(k), **row}
        for k, row in rows.items()
    }


def check_against(found: Subject, other: Subject) -> None:
    """Refuse a comparison with pictures of another shape, before anything is drawn.

    Raises:
        UserError: they are.
    """
    ours, theirs = picture_shape(found.teacher), picture_shape(other.teacher)
    if ours != theirs:
        a, b = ("×".join(map(str, s)) for s in (ours, theirs))
        raise UserError(f"--against: its pictures are {b}, not {a}")


def agreement(
    found: Subject, other: Subject, prompts: list[str], steps: int, full: int
) -> dict[str, float]:
    """How near pictures come to another's of the same noise: a student's to its teacher's.

    A student that is trained on distributions alone may be good and disagree.

    Args:
        full: The other's step count.
    """
    some = prompts[:: max(1, len(prompts) // AGREEING)][:AGREEING]
    ours = found.draw(some, steps, None)(some, 0).images
    theirs = other.draw(some, full, None)(some, 0).images
    rows = {"teacher_psnr": psnr(ours, theirs).clamp(max=99).mean().item()}
    if min(picture_shape(found.teacher)[1:]) >= LPIPS_FROM:
        distances = [lpips()(a[None], b[None]) for a, b in zip(ours, theirs, strict=True)]
        rows["teacher_lpips"] = torch.cat(distances).double().mean().item()
    return rows


def speeds(found: Subject, steps: Sequence[int], device: torch.device) -> dict[str, Any]:
    """How fast it draws at each step count, and on what; see `distill/sampling/speed.py`.

    Raises:
        UserError: there is no memory for one picture.
    """
    asked, counted = speed.prompts(found.teacher, speed.CAP), speed.evaluated(found.denoiser)
    gauge, rows = speed.timer_of(device), {}
    try:
        with encoders_on(found.teacher, device):
            for k in steps:
                with waiting(f"{found.who} in {k}: speed"):
                    draw = found.draw(asked, k, speed.CAP)
                    rows[str(k)] = speed.measured(
                        lambda n, draw=draw: draw(asked[:n], 0), counted, gauge, speed.CAP
                    )
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            "--speed: out of memory at one picture; give --precision bf16, or a larger card"
        ) from None
    return {**speed.machine(found.denoiser, device), "steps": rows}


def recall(record: Path | None, about: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What an earlier call of the same kind had found by seed; empty if there was none."""
    if record is None or not record.is_file():
        return {}
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        same = kept["about"] == json.loads(json.dumps(about))
        return dict(kept["figures"]) if same else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
