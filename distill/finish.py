"""The end of a run: the averaged student exported, measured beside its teacher, and summed up."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.build import Run
from distill.drawing import evaluate_teacher, own
from distill.files import write
from distill.lock import release
from distill.measure import evaluate_student, student_samples
from distill.meter import device_name, peak_memory
from distill.pictures import COLUMNS, save_grid
from distill.report import PICTURES, report
from distill.teaching import guided
from eval.fid import Moments, frechet
from eval.samples import Samples
from students import linear, lora_files
from students.export import export
from students.generator import Generator
from students.restored import restored
from students.rows import many
from teachers.guidance import describe

TEACHER_FEW = (1, 2, 4)  # the teacher's own few-step samples, shown beside the student's


def finish(run: Run) -> dict[str, Any]:
    """Export the averaged student, measure it and its teacher, and write summary.json."""
    engine, recipe = run.engine, run.recipe
    engine.total_evaluations()
    summary: dict[str, Any] = {}
    if engine.accelerator.is_main_process:
        with engine.ema.swapped():
            if linear.exact(run.teacher):
                student = run.student
                linear.save(student, run.out / "student")
            else:
                student = restored(run.student, run.teacher)
                export(student, run.teacher, run.out / "student", recipe.tree())
                save_pictures(run, student)
            if lora_files.possible(run.student, run.teacher):
                lora_files.export_lora(
                    run.student, run.teacher, run.out / "student", run.out / "lora"
                )
            summary = summarise(run, measure_all(run, student))
        write(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        if not linear.exact(run.teacher):
            report(run.out)
    engine.accelerator.wait_for_everyone()
    engine.accelerator.end_training()
    release(run.out)
    return summary


def save_pictures(run: Run, student: Generator) -> None:
    """Grids of the teacher's and the student's pictures, all from the same noise."""
    folder, shown = run.out / "samples" / PICTURES, run.engine.shown
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.json").write_text(json.dumps(shown))

    def save(who: str, steps: int, samples: Samples) -> None:
        save_grid(samples.images / 127.5 - 1, folder / f"{who}-{steps}.png", COLUMNS)

    for steps in (run.recipe.eval.teacher_steps, 1):
        save("teacher", steps, own(run.recipe, run.teacher, steps)(list(shown), 0))
    for k in student.counts:
        save("student", k, student_samples(student.at(k), run.teacher, shown, 0))


def measure_all(run: Run, student: Generator) -> dict[str, Any]:
    """The exported student at every count, teacher at its full and few steps; empty unmeasured."""
    if linear.exact(run.teacher):
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
    """Whether the run in `out` came to its end."""
    try:
        summary = json.loads((out / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    whole = isinstance(summary, dict) and {"steps", "wall_s", "metrics"} <= summary.keys()
    return whole and (out / "student").is_dir()


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
    packages = ("torch", "accelerate", "diffusers", "fewstep")
    return {
        "objective": run.recipe.objective["name"],
        "steps": engine.step,
        "seed": run.recipe.train.seed,
        "guidance": describe(guided(run.recipe, run.teacher)),
        "wall_s": engine.seconds,
        "network_evaluations": sum(engine.evaluations.values()),
        "network_evaluations_by_network": engine.evaluations,
        "peak_memory_gb": peak_memory(device),
        "metrics": metrics,
        "device": f"{device.type} ({device_name(device)}, {many(threads, 'thread')})",
        "processes": engine.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
