"""`distill compat`: LoRA files of users in a student, beside the teacher with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Student, check_writable, expand_home

MAX_SAMPLES = 10_000


LoRAs = Annotated[
    list[Path],
    typer.Argument(metavar="LORA", help="LoRA files (.safetensors) of the base model."),
]
Strengths = Annotated[str, typer.Option(help="At which each LoRA is added, such as 0.5,1.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        callback=expand_home,
        help="A text file with one prompt on each line; a LoRA's trigger word belongs in it.",
        show_default="the embedded teacher's own, or a pack's",
    ),
]
Samples = Annotated[int, typer.Option(min=2, max=MAX_SAMPLES, help="Pictures of each model.")]
Steps = Annotated[
    int | None,
    typer.Option(help="The student's step count.", show_default="the best one measured"),
]
Source = Annotated[
    str | None, typer.Option("--teacher", help="The teacher.", show_default="the recipe's")
]
Features = Annotated[
    str | None,
    typer.Option(
        help="Features in which styles are compared, or pixels.", show_default="the protocol's"
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        callback=expand_home,
        help="The folder for compat.json and compat.png.",
        show_default="STUDENT-compat",
    ),
]


def compat(
    student: Student,
    loras: LoRAs,
    strengths: Strengths = "0.5,1",
    prompts: Prompts = None,
    samples: Samples = 64,
    steps: Steps = None,
    source: Source = None,
    features: Features = None,
    out: Out = None,
):
    """Compare a student with its teacher, each with users' LoRA files.

    Both draw the same prompts from the same noise, the student at guidance 1 and the teacher with
    its own guidance. A table shows how much of each style arrives, and what it does to colours and
    prompts.
    """
    import json

    from distill.console import out as console
    from distill.console import spinner
    from distill.files import write
    from teachers.errors import UserError

    files = tuple(p for path in loras if (p := expand_home(path)) is not None)
    values = strengths_of(strengths)
    if not student.exists():
        raise UserError(f"STUDENT {student}: no such folder; give a run or an exported student")
    folder = out or student.absolute().with_name(f"{student.absolute().name}-compat")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: it is a file; give a folder")
    check_writable(folder / "compat.json" if folder.is_dir() else folder, "--out")
    with spinner("distill: preparing"):  # the imports take seconds
        from distill.evaluation import compat_page
        from distill.evaluation.compat import compare
        from distill.evaluation.compat_checks import Request
    asked = Request(student, files, values, prompts, samples, steps, source, features)
    tree, pictures = compare(asked)
    folder.mkdir(exist_ok=True)
    write(folder / "compat.json", json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    compat_page.save(tree, pictures, folder / "compat.png")
    console.print(compat_page.table(tree))
    console.print(f"figures and pictures in {folder}", soft_wrap=True, markup=False)


def strengths_of(text: str) -> tuple[float, ...]:
    """The strengths in `--strengths`, each once.

    Raises:
        UserError: one is no finite number.
    """
    from teachers.errors import UserError, quoted

    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"--strengths {quoted(text)}: expected numbers, such as 0.5,1")
        values.append(value)
    return tuple(dict.fromkeys(values))
