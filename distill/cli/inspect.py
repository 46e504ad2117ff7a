"""`distill doctor`, `plan`, `list`, `show`: checks, estimates, and what files say of themselves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import Overrides, RecipeArg, check_writable, expand_home

TeacherArg = Annotated[
    str, typer.Argument(help="As in a recipe's teacher.source, or FILE.py:FUNCTION.")
]
Config = Annotated[
    str | None,
    typer.Option(
        help="Of a single file: a diffusers folder or Hub id of the same family.",
        show_default="the family's",
    ),
]


def doctor(
    teacher: TeacherArg,
    image: Annotated[
        Path | None,
        typer.Option(
            callback=expand_home,
            help="An image like those the teacher was trained on, or a folder of them.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A caption of the image.")] = None,
    null_label: Annotated[
        int | None, typer.Option(min=0, help="The class that means no class, if there is one.")
    ] = None,
    config: Config = None,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Skip the checks that need trained weights.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", callback=expand_home, help="Write the checks to this JSON file."),
    ] = None,
):
    """Check that a teacher denoises as its configuration says.

    Exit code 2 if a check fails.
    """
    from distill.console import out as console
    from distill.data.encode import device
    from distill.data.from_recipe import examples
    from distill.planning.doctor import diagnose, examples_for, has_pictures, table, verdict
    from teachers.catalogue.loading import load
    from teachers.errors import UserError
    from teachers.teacher import EMBEDDED

    if json_file is not None:
        check_writable(json_file, "--json")
    options = {"null_label": null_label, "config": config}
    loaded = load(teacher, **{k: v for k, v in options.items() if v is not None})
    loaded.denoiser.to(device())
    if teacher in EMBEDDED and image is None:
        images, prompts = examples(teacher)
    else:
        images, prompts = examples_for(loaded, image)
    if prompt is not None:
        prompts = [prompt] * len(images)
    if image is None and not has_pictures(loaded):
        structure_only = True  # no data of its kind are at hand
    checks = diagnose(loaded, images, prompts, structure_only)
    console.print(table(teacher, checks))
    if json_file is not None:
        write_checks(teacher, checks, json_file)
    console.print(verdict(checks))
    if failed := [c for c in checks if c.verdict in ("broken", "untrained?")]:
        raise UserError(f"doctor {teacher!r}: {failed[0].remedy}")


def write_checks(teacher: str, checks: Sequence[Any], file: Path) -> None:
    """Write the doctor's checks as JSON."""
    import json
    from dataclasses import asdict

    plain = {"teacher": teacher, "checks": [asdict(c) for c in checks]}
    file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def wrap(
    network: Annotated[
        str, typer.Argument(help="FILE.py or FILE.py:CLASS, a class with forward(x, t[, cond]).")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION, which returns data (N, ...) like those it learned."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(callback=expand_home, help="Its trained weights, a .safetensors file."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=expand_home, help="The file to write.", show_default="FILE_teacher"),
    ] = None,
):
    """Write the file that makes a network of your own a teacher, and check it with the doctor.

    With --data and --weights, what the network predicts, its process and its time are guessed.
    """
    from distill.console import out as console
    from distill.planning import wrap as wrapping
    from teachers.errors import UserError

    path, kind = wrapping.network_class(network)
    out = out or path.with_name(f"{path.stem}_teacher.py")
    if out.exists():
        raise UserError(f"--out {out}: it exists; give another file, or remove it")
    if out.suffix != ".py" or out.resolve().parent != path.resolve().parent:
        raise UserError(
            f"--out {out}: the adapter imports {path.name} from its own folder; give a .py file in "
            f"{path.parent}"
        )
    check_writable(out, "--out")
    adapter = wrapping.adapter(path, kind, data, weights)
    out.write_text(adapter.source, encoding="utf-8")
    console.print(f"wrote {out}", soft_wrap=True, markup=False)
    if adapter.fault:
        console.print(
            f"nothing was guessed: {kind.__name__}: {adapter.fault}", soft_wrap=True, markup=False
        )
    if not adapter.complete:
        console.print("fill in what is marked TODO, and then run: distill doctor "
                      f"{out}:teacher", soft_wrap=True, markup=False)  # fmt: skip
        return
    image = None if data is None else Path(data)
    doctor(f"{out}:teacher", image, structure_only=weights is None or data is None)


def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="The GPU to run on.")] = "rtx-4090",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", callback=expand_home, help="Write the plan to this JSON file."),
    ] = None,
):
    """Estimate the memory, time and cost of a recipe's run without training.

    Exit code 2 if the run does not fit in the GPU's memory.
    """
    import json

    from distill.console import out as console
    from distill.console import plan_table, spinner

    with spinner("distill: preparing"):  # the imports take seconds
        from distill.config.recipe import Recipe
        from distill.planning.plan import GPUS, RESERVE, advice
        from teachers.errors import UserError, nearest

        if gpu not in GPUS:
            raise UserError(f"--gpu {gpu!r}: {nearest(gpu, GPUS)}")
        if json_file is not None:
            check_writable(json_file, "--json")
        checked = Recipe.load(recipe, overrides or [])
    card = GPUS[gpu]
    waits = "distill: simulating a step on tensors without data (up to a minute)"
    with spinner(waits), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake tensors have no addresses, which torch warns about
        from distill.planning import forecast, kept

        estimate = forecast.plan(checked)
        kept.keep(checked, estimate)
    tree = estimate.tree(gpu, card)
    console.print(plan_table(tree, card.memory, RESERVE))
    if json_file is not None:
        json_file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    if remedies := advice(checked, estimate, card):
        raise UserError(
            f"plan: {estimate.most + RESERVE:.1f} GB do not fit on {gpu} ({card.memory:g} GB); "
            + "; ".join(remedies)
        )


def listing(
    what: Annotated[
        str | None,
        typer.Argument(
            help="objectives, students, recipes, teachers, metrics or protocols; default: all."
        ),
    ] = None,
):
    """List objectives, systems of students, recipes, teachers, metrics and protocols."""
    from distill.cli.catalogue import KINDS as kinds
    from distill.console import out as console
    from teachers.errors import UserError, nearest

    if what is not None and what not in kinds:
        raise UserError(f"list {what!r}: unknown; {nearest(what, kinds)}")
    from rich.table import Table

    for kind in [what] if what else kinds:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, line in kinds[kind]().items():
            table.add_row(name if what else f"  {name}", line)
        if not what:
            console.print(kind, style="bold")
        console.print(table)


def show(
    file: Annotated[
        Path,
        typer.Argument(
            callback=expand_home, help="A .safetensors file: a LoRA or all weights of a model."
        ),
    ],
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", callback=expand_home, help="Write the facts to this JSON file; - for stdout."
        ),
    ] = None,
):
    """Show what a few-step file says of itself: steps, times, sampler, guidance, base, licence.

    Also of files of others, as far as their names, headers and tensors tell. Only the header is
    read.
    """
    import json
    import sys

    from distill.console import out as console
    from students.metadata.show import report, shown

    to_stdout = json_file is not None and str(json_file) == "-"
    if json_file is not None and not to_stdout:
        check_writable(json_file, "--json")
    found = report(file)
    text = json.dumps(found.tree(), indent=2, ensure_ascii=True) + "\n"
    if to_stdout:
        sys.stdout.write(text)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in ("", "value", "known from"):
        table.add_column(head, overflow="fold")
    for name, (value, origin) in found.facts.items():
        table.add_row(name.replace("_", " "), Text(shown(value)), origin)
    console.print(table)
    for why in dict.fromkeys(found.unknown.values()):
        names = ", ".join(k.replace("_", " ") for k, v in found.unknown.items() if v == why)
        console.print(f"not known: {names}; {why}", soft_wrap=True, markup=False)
    if json_file is not None:
        json_file.write_text(text, encoding="utf-8")
