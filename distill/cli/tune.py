"""`distill tune`: life after distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import Overrides, Resume, Student, expand_home

Data = Annotated[
    Path,
    typer.Option(
        callback=expand_home, help="A folder of 20 to 200 pictures with captions beside them."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        callback=expand_home, help="The new run's folder.", show_default="runs/tune-STUDENT"
    ),
]
Method = Annotated[str, typer.Option(help="teacher, anchor, or plain for comparison.")]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Training steps.", show_default="twice the student's own, at most 2,000"
    ),
]
Rate = Annotated[
    float | None, typer.Option(help="Learning rate.", show_default="the student's own")
]
TeacherSteps = Annotated[int, typer.Option(min=1, help="Training steps of the teacher's LoRA.")]
TeacherRate = Annotated[
    float | None,
    typer.Option(help="Learning rate of the teacher's LoRA.", show_default="the student's own"),
]
Teacher = Annotated[
    Path | None,
    typer.Option(callback=expand_home, help="OUT-teacher of an earlier tuning, to take."),
]
Neutral = Annotated[
    str | None,
    typer.Option(help="Prompts without the concept, a file.", show_default="the student's own"),
]
Samples = Annotated[int, typer.Option(min=4, help="Pictures that each figure is from.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all random numbers.")]


def tune(
    student: Student,
    data: Data,
    overrides: Overrides = None,
    out: Out = None,
    method: Method = "teacher",
    steps: Steps = None,
    rate: Rate = None,
    teacher_steps: TeacherSteps = 1500,
    teacher_rate: TeacherRate = None,
    teacher: Teacher = None,
    neutral: Neutral = None,
    samples: Samples = 200,
    seed: Seed = 0,
    resume: Resume = False,
):
    """Let a student learn from your pictures and keep its steps.

    The teacher learns the pictures as a LoRA, in OUT-teacher; then the student is matched to it.
    OUT/tune.json says what was kept and what was gained. KEY=VALUE change the recipe of OUT;
    those of train and eval change the teacher's as well.
    """
    from distill.console import out as console
    from distill.console import spinner
    from teachers.errors import UserError, notes_once

    for name, value in (("rate", rate), ("teacher-rate", teacher_rate)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}: {value:g} is no learning rate; give a number above 0")
    with spinner("distill: preparing"):  # the imports take seconds
        from distill.tuning.recipes import Places, Settings, check_method
        from distill.tuning.tune import tune as run

        chosen = check_method(method)
    name = student.name if student.name != "student" else student.resolve().parent.name
    places = Places(out or Path("runs") / f"tune-{name}", data, teacher)
    settings = Settings(chosen, steps, teacher_steps, rate, teacher_rate, seed, overrides or ())
    with notes_once():
        figures = run(str(student), places, settings, neutral, samples, resume)
    for line in lines(figures, places):
        console.print(line, soft_wrap=True, markup=False)


def lines(figures: dict[str, Any], places: Any) -> list[str]:
    """What the command prints: a line for each step count, and where the student is."""
    said = []
    for steps, row in figures["students"].items():
        equal, most = row["teacher_equivalent_steps"], figures["teacher_steps"]
        gained = row["concept_gained"]
        at = f"at {steps} step{'s' * (steps != '1')}"
        worth = f"the tuned teacher's {equal}" if equal else f"more than its {most}"
        said.append(
            f"{at}: steps kept {number(row['steps_kept'])} (1 as the teacher in {most} steps, 0 as "
            f"undistilled), worth {worth}; concept gained {number(gained['student'])} (the teacher "
            f"{number(gained['teacher'])})"
        )
        before, after = (figures["quality"][k].get(steps, {}) for k in ("before", "after"))
        if shared := [k for k in before if k in after]:
            pairs = ", ".join(f"{k} {before[k]:.3g} before, {after[k]:.3g} after" for k in shared)
            said.append(f"{at}: {pairs}")
    return [*said, f"student in {places.out / 'student'}, figures in {places.out / 'tune.json'}"]


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
