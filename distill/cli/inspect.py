"""`distill doctor`, `plan`, `list`: what can be known before money is spent."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Overrides, RecipeArg, at_home, writable


def doctor(
    teacher: Annotated[str, typer.Argument(help="As a recipe names it, or file.py:function.")],
    image: Annotated[
        Path | None,
        typer.Option(
            callback=at_home, help="A picture such as it was trained on, or a folder of them."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.")] = None,
    null_label: Annotated[
        int | None, typer.Option(min=0, help="The class that means none, if there is one.")
    ] = None,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Leave out what needs trained weights.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=at_home, help="Write the checks here.")
    ] = None,
):
    """Examine a teacher's adapter before money is spent on it; exit 2 at a broken promise."""
    import json
    from dataclasses import asdict

    from distill.console import out as console
    from distill.data.encode import device
    from distill.data.from_recipe import examples
    from distill.planning.doctor import diagnose, pictures_for, table, verdict
    from teachers.catalogue.loading import load
    from teachers.errors import UserError
    from teachers.teacher import EMBEDDED

    if json_file is not None:
        writable(json_file, "--json")
    loaded = load(teacher, **({} if null_label is None else {"null_label": null_label}))
    loaded.denoiser.to(device())
    if teacher in EMBEDDED and image is None:
        images, prompts = examples(teacher)
    else:
        images, prompts = pictures_for(loaded, image), None
    if prompt is not None:
        prompts = [prompt] * len(images)
    checks = diagnose(loaded, images, prompts, structure_only)
    console.print(table(teacher, checks))
    if json_file is not None:
        plain = {"teacher": teacher, "checks": [asdict(c) for c in checks]}
        json_file.write_text(
            json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    console.print(verdict(checks))
    if broken := [c for c in checks if c.verdict in ("broken", "untrained?")]:
        raise UserError(f"doctor {teacher!r}: {broken[0].remedy}")


def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="The card to run on.")] = "rtx-4090",
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=at_home, help="Write the plan here.")
    ] = None,
):
    """Say what a recipe's run would take: memory by part, time, cost; exit 2 if it will not fit."""
    import json

    from distill.console import out as console
    from distill.console import planned, waiting

    with waiting("distill: preparing"):  # the imports alone take seconds
        from distill.config.recipe import Recipe
        from distill.planning.plan import GPUS, RESERVE, advice
        from teachers.errors import UserError, nearest

        if gpu not in GPUS:
            raise UserError(f"--gpu {gpu!r}: {nearest(gpu, GPUS)}")
        if json_file is not None:
            writable(json_file, "--json")
        checked = Recipe.load(recipe, overrides or [])
    card = GPUS[gpu]
    with waiting("distill: playing a step on shapes alone"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fake tensors, which have no addresses
        from distill.planning import forecast

        made = forecast.plan(checked)
    tree = made.tree(gpu, card)
    console.print(planned(tree, card.memory, RESERVE))
    if json_file is not None:
        json_file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    if remedies := advice(checked, made, card):
        raise UserError(
            f"plan: {made.peak + RESERVE:.1f} GB do not fit on {gpu} ({card.memory:g} GB); "
            + "; ".join(remedies)
        )


def listing(
    what: Annotated[
        str | None,
        typer.Argument(help="objectives, recipes, teachers, metrics or protocols; all by default."),
    ] = None,
):
    """Name what there is: objectives, recipes, teachers, metrics and protocols."""
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
