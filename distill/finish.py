"""The end of a run: the averaged student exported, measured beside its teacher, and summed up."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import Any

import torch

from distill.build import Run
from distill.measure import evaluate_student, evaluate_teacher
from distill.teaching import guided
from students import lora_files
from students.export import export
from students.generator import Generator
from students.restored import restored
from teachers.guidance import describe

TEACHER_FEW = (1, 2, 4)  # the teacher's own few-step samples, shown beside the student's


def finish(run: Run) -> dict[str, Any]:
    """Export the averaged student, measure it and its teacher, and write summary.json."""
    engine, recipe = run.engine, run.recipe
    engine.total_evaluations()
    summary: dict[str, Any] = {}
    if engine.accelerator.is_main_process:
        with engine.ema.swapped():
            student = restored(run.student, run.teacher)
            export(student, run.teacher, run.out / "student", recipe.tree())
            if lora_files.possible(run.student):
                lora_files.export_lora(
                    run.student, run.teacher, run.out / "student", run.out / "lora"
                )
            summary = summarise(run, measure_all(run, student))
        draft = run.out / ".summary.json"
        draft.write_text(json.dumps(summary, indent=2) + "\n")
        draft.replace(run.out / "summary.json")
    engine.accelerator.wait_for_everyone()
    engine.accelerator.end_training()
    return summary


def measure_all(run: Run, student: Generator) -> dict[str, Any]:
    """Teacher at its full and its few steps, the student that was exported at every count; empty
    without a protocol."""
    if (measure := run.protocol) is None:
        return {}
    cfg = run.recipe.eval

    def taught(steps: int) -> dict[str, Any]:
        return evaluate_teacher(run.recipe, run.teacher, measure, steps, cfg.teacher_seeds)

    few = {str(k): taught(k) for k in TEACHER_FEW}
    students = {
        str(k): evaluate_student(student.at(k), run.teacher, measure, cfg.seeds)
        for k in student.counts
    }
    return {
        "teacher": taught(cfg.teacher_steps),
        "teacher_few": few,
        "student": students,
    }


def summarise(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the run was, what it cost, and what came of it."""
    engine = run.engine
    device = engine.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
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
        "metrics": metrics,
        "device": f"{device.type} ({name or platform.machine()}, {threads} threads)",
        "processes": engine.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
