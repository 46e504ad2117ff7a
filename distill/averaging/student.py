"""The student of a finished run, with other weights than were exported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.paths import from_start
from distill.config.recipe import Recipe, read_yaml
from distill.config.renamed import current_names
from distill.data.encode import device
from distill.files import check_writable, write
from distill.publish.card import draft
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import evaluate_student
from distill.sampling.used_networks import of_student, record
from distill.training.networks import check_form, form_for, objective_of
from eval.protocols.measure import Protocol, protocol
from students.export.folder import SIDECAR
from students.form import StudentForm
from students.generator import Generator
from teachers.errors import UserError
from teachers.storage.files import read_json
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Trained:
    """A run's student, rebuilt; its weights are those from before training until they are set."""

    run: Path
    recipe: Recipe
    teacher: Teacher
    student: Generator

    @property
    def form(self) -> StudentForm:
        return form_for(self.recipe, self.teacher)

    @property
    def params(self) -> list[nn.Parameter]:
        """What was trained, in the order of checkpoints and snapshots."""
        return list(self.student.parameters())

    @property
    def measure(self) -> Protocol | None:
        """The run's protocol."""
        name = self.recipe.eval.protocol
        return None if name is None else protocol(name)

    @torch.no_grad()
    def set(self, values: Iterable[Tensor]) -> None:
        """Give the student these weights.

        Raises:
            UserError: they are of another network.
        """
        for p, value in zip(self.params, values, strict=True):
            if p.shape != value.shape:
                raise UserError(
                    f"RUN: {self.run}: a saved weight is {tuple(value.shape)}, not "
                    f"{tuple(p.shape)}; the teacher changed since the run"
                )
            p.copy_(value)

    def figures(self, student: Generator, steps: int, seeds: int) -> dict[str, Any]:
        """The protocol's figures of a student at a step count."""
        assert self.measure is not None
        return evaluate_student(student.at(steps), self.teacher, self.measure, seeds)


def trained(run: Path) -> Trained:
    """The student of a run, on the device.

    Raises:
        UserError: the folder holds no run, or its student leaves no pipeline.
    """
    check_run(run)
    tree = from_start(current_names(read_yaml(run / "recipe.yaml"), quiet=True), run)
    recipe = Recipe.check(tree, f"RUN: {run}")
    teacher = load_teacher(recipe.teacher)
    form = form_for(recipe, teacher)
    if not form.leaves_pipeline:
        raise UserError(
            f"RUN: {run}: its student is no pipeline of diffusers, of which averages are made; "
            "give another run"
        )
    check_form(recipe, form)
    teacher.denoiser.to(device())
    objective = objective_of(recipe, teacher, device())
    return Trained(run, recipe, teacher, objective.student)


def check_run(run: Path) -> None:
    """Refuse a folder that holds no run.

    Raises:
        UserError: it holds none.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"RUN: {run}: no recipe.yaml there; give the folder of a `distill run`")


def check_out(out: Path) -> None:
    """Refuse a folder that exists or cannot be made, before any work; make the one around it.

    Raises:
        UserError: it exists, or cannot be made.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: it exists; give a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: it cannot be made ({error.strerror}); give another folder"
        ) from None
    check_writable(out, "--out")


def export(source: Trained, out: Path, about: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Write the student with its present weights to a folder, measured and with its card.

    Args:
        about: Says what its weights are; `line` is the card's, and `chosen_by` the network whose
            figure chose them.
        seeds: Of the measurement; 0 for none.

    Returns:
        The figures by step count; empty if it is not measured.
    """
    student = source.form.export(source.student, out, source.recipe.tree())
    sidecar = read_json(out / SIDECAR, f"student {str(out)!r}")
    chosen_by = {k: about[k] for k in ("chosen_by",) if k in about}
    sidecar = {**sidecar, "average": about["line"], **chosen_by}
    write(out / SIDECAR, json.dumps(sidecar, indent=2) + "\n")
    rows: dict[str, Any] = {}
    if seeds and source.measure is not None:
        rows = {str(k): source.figures(student, k, seeds) for k in student.counts}
    write(out / "average.json", json.dumps({**about, "metrics": rows}, indent=2) + "\n")
    if summary := summary_of(source.run, rows):
        summary |= record(of_student(sidecar), source.recipe.eval.protocol or "", rows)
    write(out / "README.md", draft(out, summary))
    return rows


def summary_of(run: Path, rows: dict[str, Any]) -> dict[str, Any]:
    """The run's summary with these figures for its student's; empty if the run has none."""
    if not (run / "summary.json").is_file():
        return {}
    summary = read_json(run / "summary.json", f"run {str(run)!r}")
    metrics = {k: v for k, v in summary.get("metrics", {}).items() if k != "student"}
    return {**summary, "metrics": {**metrics, "student": rows} if rows else {}}
