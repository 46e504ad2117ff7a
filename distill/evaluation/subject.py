"""What `distill eval` measures: students and teachers, by a protocol, one seed at a time.

A call that was cut off resumes after the last finished seed. Several processes share the chunks of
each seed; the figures do not depend on the number of processes.
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
from distill.console import sampling_bar, spinner
from distill.data.encode import encoders_on, picture_shape
from distill.files import stamps, write
from distill.publish.results_table import steps_of
from distill.sampling import speed, used_networks
from distill.sampling.baselines import Baseline, Stock, StockEDM
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import check_protocol, routed_samples, student_samples
from distill.sampling.timesteps import COMPUTED, FINE_STEPS, TRUNCATED
from eval.metrics.perceptual import lpips, psnr
from eval.protocols.measure import PROTOCOLS, Protocol, Sampler
from eval.stream import ONE_PROCESS, Processes
from students.export.folder import SIDECAR, has_student, load_student, refuse_unfinished
from students.routing import folder as routing
from teachers.denoiser import Denoiser
from teachers.errors import UserError, nearest
from teachers.quantised import Precision
from teachers.solver import SOLVERS
from teachers.storage.files import home, read_json
from teachers.teacher import EMBEDDED, Teacher

OPTIONS = {"threshold": "adaptive"}  # options of `distill eval` that are other keys of a baseline
LPIPS_MIN_SIDE = 64  # pixels; for smaller images agreement is PSNR alone
AGREEMENT_IMAGES = 256


@dataclass(frozen=True)
class Subject:
    """A student or a teacher that can be sampled in several step counts.

    Args:
        kind: "student" or "teacher".
        counts: The step counts that it supports; None for any.
        sampler: From prompts, a step count and a batch size to a sampler. The batch is the number
            of images in one call of the networks; None for as many as their size allows.
        identity: Plain data on which its figures depend, such as files and options.
        denoiser: Its network.
        max_steps: The greatest step count that it supports; None without a limit.
        sampler_name: The sampler's name in tables; empty for a student's own.
        used_networks: The networks of images that a student's training read.
    """

    kind: str
    teacher: Teacher
    counts: tuple[int, ...] | None
    sampler: Callable[[list[str], int, int | None], Sampler]
    identity: dict[str, Any]
    denoiser: Denoiser
    max_steps: int | None = None
    sampler_name: str = ""
    used_networks: tuple[str, ...] = ()

    def check(self, steps: Sequence[int]) -> None:
        """Refuse step counts that it does not support.

        Raises:
            UserError: naming the counts, or the greatest, that it supports.
        """
        if self.max_steps is not None and max(steps) > self.max_steps:
            raise UserError(
                f"--steps {max(steps)}: computed schedules support at most {self.max_steps} steps; "
                "give fewer"
            )
        if self.counts is not None and (wrong := sorted(set(steps) - set(self.counts))):
            known = ", ".join(map(str, self.counts))
            by = "this student was trained" if self.kind == "student" else "truncated times exist"
            raise UserError(f"--steps {wrong[0]}: {by} for {known}; give those")


def is_student(source: str) -> bool:
    """Whether a folder holds an exported student, or a run that has one.

    Raises:
        UserError: it is a run that has not exported its student.
    """
    folder = home(source)
    refuse_unfinished(folder)
    return has_student(folder) or routing.is_routed(folder)


def usual_protocol(source: str) -> str:
    """The protocol of a student's own run, or that of an embedded teacher.

    Raises:
        UserError: the source has none.
    """
    folder, teacher, named = home(source), source, None
    refuse_unfinished(folder)
    for path in (folder / SIDECAR, folder / "student" / SIDECAR, folder / routing.ROUTER):
        if path.is_file():
            sidecar = read_json(path, f"student {source!r}")
            teacher, recipe = sidecar.get("teacher"), sidecar.get("recipe")
            named = recipe.get("eval") if isinstance(recipe, dict) else None
            named = named.get("protocol") if isinstance(named, dict) else None
    for name in (named, teacher):
        if name in PROTOCOLS:
            return name
    if not folder.exists() and source.count("/") != 1:
        raise UserError(f"{source}: no such folder, and no embedded teacher; "
                        f"{nearest(source, EMBEDDED)}")  # fmt: skip
    own = "has none of its own" if folder.exists() else "is no folder here, and a Hub id has none"
    raise UserError(f"--protocol: missing; {source} {own}; {nearest('', PROTOCOLS)}")


def refuse_options(options: dict[str, Any], reason: str) -> None:
    """Refuse options of `teacher` that differ from their defaults.

    Raises:
        UserError: naming the first of them.
    """
    defaults = {k: p.default for k, p in inspect.signature(teacher).parameters.items()}
    if wrong := next((k for k, v in options.items() if v != defaults[k]), None):
        raise UserError(f"--{wrong.replace('_', '-')}: {reason}")


def student(source: str, device: torch.device, precision: Precision | None = None) -> Subject:
    """An exported student, sampled as stock diffusers samples it.

    Args:
        precision: Of its weights; fp32 by default.

    Raises:
        UserError: the folder holds no student, or a damaged one.
    """
    folder = home(source)
    if routing.is_routed(folder):
        return routed(folder, device, precision)
    generator, teacher = load_student(folder, precision)
    generator = generator.to(device)

    def sampler(prompts: list[str], steps: int, batch: int | None) -> Sampler:
        few_step = generator.at(steps)
        return lambda part, seed: student_samples(few_step, teacher, part, seed, batch)

    identity = {"files": stamps(str(folder)), "precision": precision}
    places = (folder / SIDECAR, folder / "student" / SIDECAR)
    sidecar = next((path for path in places if path.is_file()), places[0])
    used = tuple(used_networks.of_student(read_json(sidecar, f"student {source!r}")))
    return Subject(
        "student",
        teacher,
        generator.counts,
        sampler,
        identity,
        generator.denoiser,
        used_networks=used,
    )


def routed(folder: Path, device: torch.device, precision: Precision | None = None) -> Subject:
    """Routed students, sampled as their pipeline samples them.

    Raises:
        UserError: the folder is damaged.
    """
    students = routing.load(folder, precision)
    first, teacher = students.experts[0]
    for generator, _ in students.experts:
        generator.to(device)

    def sampler(prompts: list[str], steps: int, batch: int | None) -> Sampler:
        return lambda part, seed: routed_samples(students, part, seed, steps, batch)

    identity = {"files": stamps(str(folder)), "precision": precision}
    return Subject("student", teacher, first.counts, sampler, identity, first.denoiser)


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
    inherit: Sequence[str] = (),
) -> Subject:
    """A teacher with one of our solvers or one of diffusers' schedulers.

    Args:
        source: As `teacher.source` in a recipe.
        adaptive: The cosine at which guidance stops; None for guidance in all steps.
        schedule, cache, inherit: As in `Baseline`.

    Raises:
        UserError: there is no such teacher, or it does not support these options.
    """
    schedulers = {*get_args(Stock), *get_args(StockEDM)}
    if solver not in SOLVERS and solver not in schedulers:
        raise UserError(f"--solver {solver!r}: unknown; {nearest(solver, [*SOLVERS, *schedulers])}")
    section = {"source": source, "guidance": guidance, "null_label": null_label}
    section["precision"] = precision
    unused = {"objective": {"name": "sid"}, "train": {"steps": 1}}  # only the teacher is built
    recipe = Recipe.check({"teacher": section, **unused}, "eval")
    loaded = load_teacher(recipe.teacher)
    loaded.denoiser.to(device)
    key = "solver" if solver in SOLVERS else "scheduler"
    tree: dict[str, Any] = {key: solver, "schedule": schedule, "cache": cache}
    tree["inherit"] = [*inherit]
    counts = tuple(TRUNCATED) if schedule == "truncated" else None
    if counts is not None:
        tree["steps"] = counts
    if adaptive is not None:
        tree |= {"guidance": "adaptive", "threshold": adaptive}
    baseline = baseline_of(tree)
    baseline.check(recipe, loaded, f"eval: {baseline.name}")

    @lru_cache
    def cached(prompts: tuple[str, ...], steps: int, batch: int | None) -> Sampler:
        return baseline.sampler(recipe, loaded, prompts, steps, batch)

    def sampler(prompts: list[str], steps: int, batch: int | None) -> Sampler:
        return cached(tuple(prompts), steps, batch)  # all seeds share one computed schedule

    max_steps = FINE_STEPS if schedule in COMPUTED else None
    identity = {**section, **tree, "files": stamps(source)}
    return Subject(
        "teacher", loaded, counts, sampler, identity, loaded.denoiser, max_steps, baseline.name
    )


def baseline_of(tree: dict[str, Any]) -> Baseline:
    """The baseline of these keys.

    Raises:
        UserError: naming the option of `distill eval` that is wrong.
    """
    try:
        return Baseline.model_validate(tree)
    except ValidationError as error:
        key, _, fault = explain(error, Baseline).partition(": ")
        option = f"--{OPTIONS.get(key, key)}" if key else "eval"
        raise UserError(f"{option}: {fault}") from None


def evaluate(
    subject: Subject,
    measure: Protocol,
    steps: Sequence[int],
    seeds: int,
    processes: Processes = ONE_PROCESS,
    record: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The protocol's figures at each step count.

    Args:
        record: A file that keeps the figures of each finished seed, from which a call that was cut
            off resumes. It counts for the same subject and protocol only.

    Raises:
        UserError: the protocol does not fit the subject's images.
        MetricError: a figure cannot be computed.
    """
    check_protocol(measure, subject.teacher)
    measure.check()
    n = len(measure.prompts)
    identity = {"protocol": measure.name, "n": n, "who": subject.kind, **subject.identity}
    finished = finished_seeds(record, identity)
    results = {}
    for k in steps:
        for seed in range(seeds):
            if (key := f"{k}/{seed}") in finished:
                continue
            task = f"{subject.kind} in {k}: seed {seed}, {n:,} images"
            with sampling_bar(task, n / processes.count) as progress:
                sampler = subject.sampler(measure.prompts, k, None)
                finished[key] = measure.measure_seed(
                    sampler, seed, processes, record, [identity, k], progress
                )
            if record is not None and processes.rank == 0:
                tree = {"about": identity, "figures": finished}
                write(record, json.dumps(tree, indent=2) + "\n")
        results[str(k)] = measure.average([finished[f"{k}/{seed}"] for seed in range(seeds)])
    return results


def table_rows(subject: Subject, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of figures by their names in tables, with the evaluations of one image."""
    sampler = f" of {subject.sampler_name}" if subject.sampler_name else ""
    return {
        f"{subject.kind}, {steps_of([k])}{sampler}": {"evaluations": float(k), **row}
        for k, row in rows.items()
    }


def check_against(subject: Subject, other: Subject) -> None:
    """Refuse to compare images of different shapes.

    Raises:
        UserError: the shapes differ.
    """
    shape, other_shape = picture_shape(subject.teacher), picture_shape(other.teacher)
    if shape != other_shape:
        a, b = ("×".join(map(str, s)) for s in (shape, other_shape))
        raise UserError(f"--against: its images are {b}; give a teacher of {a} images")


def agreement(
    subject: Subject, other: Subject, prompts: list[str], steps: int, other_steps: int
) -> dict[str, float]:
    """The mean distance of a subject's images to the other's from the same noise.

    A student that was trained to match distributions can be good and still disagree.
    """
    some = prompts[:: max(1, len(prompts) // AGREEMENT_IMAGES)][:AGREEMENT_IMAGES]
    images = subject.sampler(some, steps, None)(some, 0).images
    others = other.sampler(some, other_steps, None)(some, 0).images
    figures = {"teacher_psnr": psnr(images, others).clamp(max=99).mean().item()}
    if min(picture_shape(subject.teacher)[1:]) >= LPIPS_MIN_SIDE:
        distances = [lpips()(a[None], b[None]) for a, b in zip(images, others, strict=True)]
        figures["teacher_lpips"] = torch.cat(distances).double().mean().item()
    return figures


def speeds(subject: Subject, steps: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The speed at each step count, and the machine; see `distill/sampling/speed.py`.

    Raises:
        UserError: the memory does not suffice for one image.
    """
    prompts = speed.prompts(subject.teacher, speed.MAX_BATCH)
    counter = speed.evaluated_module(subject.denoiser)
    timer, rows = speed.timer_of(device), {}
    try:
        with encoders_on(subject.teacher, device):
            for k in steps:
                with spinner(f"{subject.kind} in {k}: speed"):
                    sampler = subject.sampler(prompts, k, speed.MAX_BATCH)
                    rows[str(k)] = speed.measure(
                        lambda n, sampler=sampler: sampler(prompts[:n], 0),
                        counter,
                        timer,
                        speed.MAX_BATCH,
                    )
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            "--speed: out of memory at one image; give --precision bf16, or use a larger GPU"
        ) from None
    return {**speed.machine(subject.denoiser, device), "steps": rows}


def finished_seeds(record: Path | None, identity: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures by "STEPS/SEED" that an earlier call for the same identity has recorded."""
    if record is None or not record.is_file():
        return {}
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        same = tree["about"] == json.loads(json.dumps(identity))
        return dict(tree["figures"]) if same else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
