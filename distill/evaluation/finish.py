"""The end of a run: exports and measures the averaged student, and writes the summary."""

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
from distill.attempts import FIGURES, LOG, append_traceback, one_line
from distill.files import write
from distill.grids import save_samples
from distill.profiling import device_name, peak_memory
from distill.publish.card import draft
from distill.publish.licence import licence_of
from distill.publish.results_table import many
from distill.report.page import PICTURES, report
from distill.sampling import used_networks
from distill.sampling.guided_teacher import guided
from distill.sampling.own_metric import page_of
from distill.sampling.student_sampler import evaluate_student, student_samples
from distill.sampling.teacher_sampler import evaluate_teacher, recipe_sampler
from distill.training.build import Run
from distill.training.run_folder import release
from eval.metrics.fid import Moments, frechet
from eval.samples import Samples
from students.export import lora_files
from students.export.folder import ExportError
from students.form import Normal
from students.generator import Generator
from teachers.conditions import Pictured
from teachers.guidance import describe

TEACHER_FEW = (1, 2, 4)  # step counts of the teacher that are measured beside the student


def finish(run: Run) -> dict[str, Any]:
    """Export the averaged student, measure it and its teacher, and write summary.json.

    A failure of any other part does not stop the rest: `failed` in the summary has a line for each.

    Raises:
        ExportError: the student itself cannot be exported; its checkpoints stay.
    """
    engine = run.engine
    engine.total_evaluations()
    summary: dict[str, Any] = {}
    if engine.accelerator.is_main_process:
        with engine.ema.swapped():
            student = export_student(run)
            if run.form.leaves_pipeline:
                write_extras(run, student)
            metrics: dict[str, Any] = {}
            with engine.extras.attempt(FIGURES):
                metrics = measure_all(run, student)
        summary = summarise(run, metrics)
        if run.form.leaves_pipeline:
            with engine.extras.attempt("student/README.md"):
                write(run.out / "student" / "README.md", draft(run.out / "student", summary))
            with engine.extras.attempt("report.html"):
                save_summary(run, summary)  # the report reads it
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
    """Write summary.json, with the failures so far."""
    summary["failed"] = {**run.engine.extras.failed}
    write(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")


def export_student(run: Run) -> Generator:
    """Export the student; the student as it is measured.

    Raises:
        ExportError: it could not be exported.
    """
    try:
        return run.form.export(run.student, run.out / "student", run.recipe.tree())
    except Exception as error:
        append_traceback(run.out, "student", error)
        raise ExportError(
            f"student: {one_line(error)}; nothing is lost: `distill run … --resume` tries again "
            f"from the last checkpoint ({run.out / LOG} has the traceback)"
        ) from error


def write_extras(run: Run, student: Generator) -> None:
    """Write the card, the grids of images and the LoRA files."""
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
                failed=lambda name, error: extras.record(f"lora/{name}", error),
                licence=licence_of(run.teacher.source).label,
            )


def save_pictures(run: Run, student: Generator) -> None:
    """Write grids of the teacher's and the student's images, all from the same noise."""
    folder, shown = run.out / "samples" / PICTURES, run.engine.shown
    folder.mkdir(parents=True, exist_ok=True)
    texts = [str(v) if isinstance(v, Pictured) else v for v in shown]
    (folder / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")

    def save(kind: str, steps: int, sample: Callable[[], Samples]) -> None:
        name = f"{kind}-{steps}.png"
        with run.engine.extras.attempt(f"samples/{PICTURES}/{name}"):
            save_samples(sample().images / 127.5 - 1, shown, folder / name)

    for steps in (run.recipe.eval.teacher_steps, 1):
        save(
            "teacher",
            steps,
            partial(recipe_sampler(run.recipe, run.teacher, steps), list(shown), 0),
        )
    for k in student.counts:
        save("student", k, partial(student_samples, student.at(k), run.teacher, shown, 0))


def measure_all(run: Run, student: Generator) -> dict[str, Any]:
    """The exported student at every count, teacher at its full and few steps; empty unmeasured."""
    if (distributions := run.form.distributions(student)) is not None:
        return {"student": {"1": closed_form_distance(*distributions)}}
    if run.metric is not None:
        metrics = run.metric.measure(student)
        if not run.form.leaves_pipeline:
            page = run.out / "student" / "README.md"
            write(page, page.read_text(encoding="utf-8") + page_of(metrics))
        return metrics
    if (measure := run.protocol) is None:
        return {}
    cfg = run.recipe.eval

    def teacher_figures(steps: int) -> dict[str, Any]:
        return evaluate_teacher(run.recipe, run.teacher, measure, steps, cfg.teacher_seeds)

    teachers = {}
    if cfg.teacher_seeds:
        few = {str(k): teacher_figures(k) for k in TEACHER_FEW}
        teachers = {"teacher": teacher_figures(cfg.teacher_steps), "teacher_few": few}
    students = {
        str(k): evaluate_student(student.at(k), run.teacher, measure, cfg.seeds)
        for k in student.counts
    }
    return {**teachers, "student": students}


def finished(out: Path) -> bool:
    """Whether the run in `out` has ended: its student exists and was measured."""
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    complete = isinstance(summary, dict) and {"steps", "wall_s", "metrics"} <= summary.keys()
    return complete and FIGURES not in failed(summary) and (out / "student").is_dir()


def failed(summary: dict[str, Any]) -> dict[str, str]:
    """The parts of a run that failed, from its summary; earlier versions recorded none."""
    parts = summary.get("failed")
    return parts if isinstance(parts, dict) else {}


def closed_form_distance(student: Normal, teacher: Normal) -> dict[str, Any]:
    """The Fréchet distance between two normal distributions: no sample is drawn."""
    moments = [Moments(n.mean.double().cpu(), n.cov.double().cpu(), 0) for n in (student, teacher)]
    return {"fd": frechet(*moments), "protocol": "closed form", "n": 0, "seeds": 1}


def summarise(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """The content of summary.json: the run's settings, cost and figures."""
    engine = run.engine
    device = engine.accelerator.device
    evaluations = dict(engine.evaluations)
    if engine.source.evaluations:  # the teacher's, before training
        evaluations["pairs"] = engine.source.evaluations
    threads = torch.get_num_threads()
    versions = {p: version(p) for p in ("torch", "accelerate", "diffusers")}
    versions["fewstep"] = __version__  # of the running code, which may not be installed
    return {
        "objective": run.recipe.objective["name"],
        **({"loss_features": features} if (features := engine.objective.loss_features) else {}),
        **used_networks.record(
            used_networks.used_networks(run.recipe.tree()),
            run.recipe.eval.protocol or "",
            metrics.get("student", {}),
        ),
        "steps": engine.step,
        **({"ended": engine.ended} if engine.ended else {}),
        "seed": run.recipe.train.seed,
        "guidance": describe(guided(run.recipe.teacher, run.teacher)),
        "wall_s": engine.seconds,
        "network_evaluations": sum(evaluations.values()),
        "network_evaluations_by_network": evaluations,
        **({} if engine.guards is None else {"guards": engine.guards.state_dict()}),
        "peak_memory_gb": peak_memory(device),
        "metrics": metrics,
        "device": f"{device.type} ({device_name(device)}, {many(threads, 'thread')})",
        "processes": engine.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **versions},
        "failed": {**engine.extras.failed},
    }
