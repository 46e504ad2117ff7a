"""The end of a run: the averaged student exported, measured beside its teacher, and summed up."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill import __version__
from distill.attempts import FIGURES, LOG, line_of, log
from distill.files import write
from distill.grids import COLUMNS, save_grid
from distill.profiling import device_name, peak_memory
from distill.publish.card import draft
from distill.publish.results_table import many
from distill.report.page import PICTURES, report
from distill.sampling.guided_teacher import guided
from distill.sampling.student_sampler import evaluate_student, student_samples
from distill.sampling.teacher_sampler import evaluate_teacher, own
from distill.training.build import Run
from distill.training.run_folder import release
from eval.metrics.fid import Moments, frechet
from eval.samples import Samples
from students import gaussian
from students.export import lora_files
from students.export.folder import ExportError, export
from students.export.unquantised import unquantised
from students.generator import Generator
from teachers.guidance import describe

TEACHER_FEW = (1, 2, 4)  # the teacher's own few-step samples, shown beside the student's


def finish(run: Run) -> dict[str, Any]:
    """Export the averaged student, measure it and its teacher, and write summary.json.

    What else a run leaves is tried part by part: `failed` in the summary has a line for each that
    could not be made, and the others are there.

    Raises:
        ExportError: the student itself could not be exported; its checkpoints are kept.
    """
    engine = run.engine
    engine.total_evaluations()
    summary: dict[str, Any] = {}
    if engine.accelerator.is_main_process:
        with engine.ema.swapped():
            student = leave_student(run)
            if not gaussian.exact(run.teacher):
                leave_extras(run, student)
            metrics: dict[str, Any] = {}
            with engine.extras.attempt(FIGURES):
                metrics = measure_all(run, student)
        summary = summarise(run, metrics)
        if not gaussian.exact(run.teacher):
            with engine.extras.attempt("report.html"):
                save_summary(run, summary)  # which the page reads
                report(run.out)
        save_summary(run, summary)
    engine.accelerator.wait_for_everyone()
    with engine.extras.attempt("trackers"):
        engine.accelerator.end_training()
    if "trackers" in engine.extras.failed and engine.accelerator.is_main_process:
        save_summary(run, summary)
    release(run.out)
    return summary


def save_summary(run: Run, summary: dict[str, Any]) -> None:
    """Write summary.json, with what has failed so far."""
    summary["failed"] = {**run.engine.extras.failed}
    write(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")


def leave_student(run: Run) -> Generator:
    """Export the student; it, as it is measured."""
    if gaussian.exact(run.teacher):
        gaussian.save(run.student, run.out / "student")
        return run.student
    try:
        student = unquantised(run.student, run.teacher)
        export(student, run.teacher, run.out / "student", run.recipe.tree())
    except Exception as error:
        log(run.out, "student", error)
        raise ExportError(
            f"student: {line_of(error)}; nothing is lost: `distill run … --resume` tries again "
            f"from the last checkpoint ({run.out / LOG} has the traceback)"
        ) from error
    return student


def leave_extras(run: Run, student: Generator) -> None:
    """The card, the grids of pictures and the LoRA files."""
    extras, folder = run.engine.extras, run.out / "student"
    with extras.attempt("student/README.md"):
        write(folder / "README.md", draft(folder))
    with extras.attempt("samples/final"):
        save_pictures(run, student)
    if lora_files.possible(run.student, run.teacher):
        with extras.attempt("lora"):
            lora_files.export_lora(
                run.student,
                run.teacher,
                folder,
                run.out / "lora",
                failed=lambda name, error: extras.note(f"lora/{name}", error),
            )


def save_pictures(run: Run, student: Generator) -> None:
    """Grids of the teacher's and the student's pictures, all from the same noise; each is tried."""
    folder, shown = run.out / "samples" / PICTURES, run.engine.shown
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.json").write_text(json.dumps(shown), encoding="utf-8")

    def save(who: str, steps: int, draw: Callable[[], Samples]) -> None:
        name = f"{who}-{steps}.png"
        with run.engine.extras.attempt(f"samples/{PICTURES}/{name}"):
            save_grid(draw().images / 127.5 - 1, folder / name, COLUMNS)

    for steps in (run.recipe.eval.teacher_steps, 1):
        save("teacher", steps, partial(own(run.recipe, run.teacher, steps), list(shown), 0))
    for k in student.counts:
        save("student", k, partial(student_samples, student.at(k), run.teacher, shown, 0))


def measure_all(run: Run, student: Generator) -> dict[str, Any]:
    """The exported student at every count, teacher at its full and few steps; empty unmeasured."""
    if gaussian.exact(run.teacher):
        return {"student": {"1": exact_distance(run)}}
    if (measure := run.protocol) is None:
        return {}
    cfg = run.recipe.eval

    def taught(steps: int) -> dict[str, Any]:
        return evaluate_teacher(run.recipe, run.teacher, measure, steps, cfg.teacher_seeds)

    teachers = {}
    if cfg.teacher_seeds:
        few = {str(k): taught(k) for k in TEACHER_FEW}
        teachers = {"teacher": taught(cfg.teacher_steps), "teacher_few": few}
    students = {
        str(k): evaluate_student(student.at(k), run.teacher, measure, cfg.seeds)
        for k in student.counts
    }
    return {**teachers, "student": students}


def finished(out: Path) -> bool:
    """Whether the run in `out` came to its end: its student is there, and was measured."""
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = isinstance(summary, dict) and {"steps", "wall_s", "metrics"} <= summary.keys()
    return whole and FIGURES not in failed(summary) and (out / "student").is_dir()


def failed(summary: dict[str, Any]) -> dict[str, str]:
    """What of a run could not be made, by its summary; earlier versions noted nothing."""
    found = summary.get("failed")
    return found if isinstance(found, dict) else {}


@torch.no_grad()
def exact_distance(run: Run) -> dict[str, Any]:
    """The Fréchet distance of a linear student's law to the teacher's: no sample is drawn."""
    teacher: Any = run.teacher.denoiser
    made: Any = run.student.denoiser
    cov = teacher.vectors * teacher.values @ teacher.vectors.T
    wanted = Moments(teacher.mean.double().cpu(), cov.double().cpu(), 0)
    found = Moments(made.mean.double().cpu(), made.cov.double().cpu(), 0)
    return {"fd": frechet(found, wanted), "protocol": "closed form", "n": 0, "seeds": 1}


def summarise(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the run was, what it cost, and what came of it."""
    engine = run.engine
    device = engine.accelerator.device
    threads = torch.get_num_threads()
    versions = {p: version(p) for p in ("torch", "accelerate", "diffusers")}
    versions["fewstep"] = __version__  # the running code's, which need not be installed
    return {
        "objective": run.recipe.objective["name"],
        "steps": engine.step,
        "seed": run.recipe.train.seed,
        "guidance": describe(guided(run.recipe.teacher, run.teacher)),
        "wall_s": engine.seconds,
        "network_evaluations": sum(engine.evaluations.values()),
        "network_evaluations_by_network": engine.evaluations,
        "peak_memory_gb": peak_memory(device),
        "metrics": metrics,
        "device": f"{device.type} ({device_name(device)}, {many(threads, 'thread')})",
        "processes": engine.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **versions},
        "failed": {**engine.extras.failed},
    }
