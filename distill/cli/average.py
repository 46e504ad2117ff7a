"""`distill average`: a finished run's student with other averages of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import RunArg, expand_home

LEAST, MOST = 1e-4, 0.28  # lengths; the even average over all steps has √(1/12)
EVALUATIONS = 100


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
