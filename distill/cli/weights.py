"""`distill average`, `compress` and `quantise`: other weights, fewer, and weights of fewer bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import RunArg, Student, expand_home

LEAST, MOST = 1e-4, 0.28  # lengths; the even average over all steps has √(1/12)
EVALUATIONS = 100

Prompts = Annotated[
    Path | None,
    typer.Option(callback=expand_home, help="Prompts that costs are measured on, a line each."),
]


def average(
    run: RunArg,
    out: Annotated[Path, typer.Option(callback=expand_home, help="The new student's folder.")],
    ema_length: Annotated[
        float | None,
        typer.Option(help="The average of this relative length, such as 0.1, up to 0.28."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Search the best combination of saved checkpoints.")
    ] = False,
    evaluations: Annotated[
        int, typer.Option(min=10, help="Combinations that the search judges.")
    ] = EVALUATIONS,
    window: Annotated[
        int | None, typer.Option(min=2, help="Newest checkpoints.", show_default="all")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps that the search judges.", show_default="fewest")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search and its noise.")] = 0,
):
    """Make a student of a run's saved weights: a longer or shorter average, or a combination.

    --ema-length needs a run with train.ema_lengths=[0.05,0.1]; --search, one with many checkpoints
    (train.keep). The student is exported, measured and described as a run's; the same command goes
    on with a search that was stopped.
    """
    from distill.console import out as console
    from distill.console import results_table, spinner
    from teachers.errors import UserError

    if (ema_length is None) != search:
        raise UserError("--ema-length: give a length or --search, one of the two")
    if ema_length is not None and not LEAST <= ema_length <= MOST:
        raise UserError(f"--ema-length {ema_length:g}: give a length from {LEAST:g} to {MOST:g}")
    of_search = {"--window": window, "--steps": steps, "--seed": seed or None}
    of_search["--evaluations"] = evaluations if evaluations != EVALUATIONS else None
    for option, value in of_search.items():
        if ema_length is not None and value is not None:
            raise UserError(f"{option}: only --search has it; remove it")
    with spinner("distill: preparing"):
        from distill.averaging.average import by_length, by_search
    if ema_length is not None:
        rows = by_length(run, ema_length, out)
    else:
        rows = by_search(run, out, evaluations, seed, window, steps)
    if rows:
        first = next(iter(rows.values()))
        title = f"{first['protocol']}: {first['n']:,} samples"
        table = {f"student, {k} step{'s' * (k != '1')}": {"evaluations": float(k), **v}
                 for k, v in rows.items()}  # fmt: skip
        console.print(results_table(title, table))
    console.print(f"student in {out}", soft_wrap=True)


def compress(
    teacher: Annotated[str, typer.Argument(help="As in a recipe's teacher.source.")],
    out: Annotated[Path, typer.Option(callback=expand_home, help="The new pipeline's folder.")],
    keep: Annotated[
        float | None,
        typer.Option(help="The share of the weights that stays at most; the cheapest layers go."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="What --keep is a share of: weights, work or time.")
    ] = "weights",
    evolve: Annotated[
        bool, typer.Option("--evolve", help="Choose one by one, each without those before.")
    ] = False,
    repeat: Annotated[
        int, typer.Option(min=0, help="How many layers run twice: the ones worth most.")
    ] = 0,
    remove: Annotated[
        list[str] | None, typer.Option(help="A layer that goes, by name; give it again for others.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(help="A setting of the network's config as KEY=VALUE, such as sample_size=8."),
    ] = None,
    prompts: Prompts = None,
    null_label: Annotated[
        int | None, typer.Option(min=0, help="The class that means no class, if there is one.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the samples that costs are measured on.")
    ] = 0,
):
    """Make a smaller network of a teacher's, with its weights: what a student can start as.

    Every layer that keeps its shape is scored by how far the output moves without it; the cheapest
    choice of the size that is asked for goes. Train it by the objective compress, then distil.
    """
    from distill.config.recipe import override
    from distill.console import out as console
    from distill.console import print_line, spinner
    from distill.data.encode import device
    from distill.planning import compress as planning
    from teachers.catalogue.loading import load

    names, settings = remove or [], override({}, config or [])
    more = {"by": by, "evolve": evolve, "repeat": repeat}
    planning.check_request(keep, names, settings, **more)
    planning.check_folder(out)
    lines = planning.lines_of(prompts)
    options = {} if null_label is None else {"null_label": null_label}
    loaded = load(teacher, **options)
    loaded.denoiser.to(device())
    with spinner("measuring what every layer is worth"):
        made = planning.compress(loaded, out, keep, names, settings, lines, seed, **more)
    for table in planning.tables(made):
        console.print(table)
    print_line(planning.summary(made, out))


def quantise(
    student: Student,
    out: Annotated[Path, typer.Option(callback=expand_home, help="The new student's folder.")],
    bits: Annotated[
        float, typer.Option(help="The largest mean over weights, 2 to 8; each layer has 2, 4 or 8.")
    ] = 8,
    activation_bits: Annotated[
        int, typer.Option(help="Of every layer's input, 4 to 8; simulated, for the figures.")
    ] = 16,
    keep_share: Annotated[
        float, typer.Option(help="The share of layers whose inputs stay in 16 bits.")
    ] = 0.01,
    prompts: Prompts = None,
    seeds: Annotated[int, typer.Option(min=0, help="That figures are averaged over.")] = 1,
):
    """Round a student's weights to few bits, with the bits of each layer by what it loses.

    The folder is a stock one with rounded weights in floating point: its pictures are those of few
    bits, its speed is not. The figures are by the protocol of the student's run.
    """
    from distill.console import out as console
    from distill.console import print_line, results_table, spinner
    from distill.planning.compress import check_folder, lines_of

    with spinner("distill: preparing"):
        from distill.planning import quantise as planning
    request = planning.Request(bits, activation_bits, keep_share, (), seeds)
    request.check()
    check_folder(out)
    request = replace(request, prompts=tuple(lines_of(prompts)))
    made = planning.quantise(student, out, request)
    if rows := planning.rows_of(made):
        first = next(iter(rows.values()))
        console.print(results_table(f"{first['protocol']}: {first['n']:,} samples", rows))
    print_line(planning.summary(made, out))


def route(
    students: Annotated[
        list[str], typer.Argument(help="Students of parts: their folders or their runs'.")
    ],
    out: Annotated[Path, typer.Option(callback=expand_home, help="The new pipeline's folder.")],
):
    """Make one pipeline of students that each learned a part of the conditions (data.where).

    It draws each prompt or label by the student that it belongs to. diffusers loads it by
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
    """
    from distill.console import print_line, spinner

    with spinner("distill: preparing"):
        from distill.evaluation import route as routes
    with spinner(f"routing {len(students)} students"):
        routed = routes.route(students, out)
    for number, part in enumerate(routed.rule["parts"]):
        print_line(f"{students[number]}: {routed.rule['by']} {', '.join(map(str, part))}")
    print_line(f"pipeline of {len(students)} students in {out}; measure it by distill eval {out}")
