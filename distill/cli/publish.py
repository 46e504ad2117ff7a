"""`distill report`, `compare`, `card`, `push`, `convert`: what a finished run is turned into."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Licence, RunArg, at_home, writable


def report(
    run: RunArg,
    out: Annotated[
        Path | None, typer.Option(callback=at_home, help="Instead of RUN/report.html.")
    ] = None,
):
    """Write a finished run's report: verdict, pictures, curves, figures and cost on one page."""
    from distill.console import out as console
    from distill.report.page import report as write

    if out is not None:
        writable(out, "--out")
    console.print(f"report in {write(run, out)}", soft_wrap=True, markup=False)


def compare(
    run: RunArg,
    reference: Annotated[
        str | None, typer.Argument(help="A shipped reference, a file, or another run's folder.")
    ] = None,
):
    """Say where a run's curves leave the band of known-good runs of its recipe."""
    from distill.console import out as console
    from distill.report import curves
    from teachers.errors import UserError

    curves.tree_of(run)  # a run without a whole recipe is none, whatever it is compared with
    found, good = curves.series(run), curves.reference_for(run, reference)
    if not (steps := curves.compared(found, good)):
        raise UserError(
            f"{run / 'metrics.jsonl'}: no logged step is one of {good.recipe}'s; "
            "log at the same ones (train.log_every), or train for longer"
        )
    left = curves.deviations(found, good)
    for departure in left:
        console.print(str(departure), soft_wrap=True, markup=False)
    kept = "every curve keeps to its band"
    console.print(
        f"{len(left)} of {len(good.bands)} curves leave their bands" if left else kept,
        f"({steps} logged steps; {good.recipe}, {good.runs} runs)",
        soft_wrap=True,
        markup=False,
    )


def card(
    run: RunArg,
    out: Annotated[
        Path | None, typer.Option(callback=at_home, help="A file to write it to.")
    ] = None,
    repo: Annotated[str, typer.Option(help="The Hub id that its snippet loads.")] = "",
    licence_override: Licence = "",
):
    """Write the model card of a finished run."""
    from distill.publish.card import card as card_of

    if out is not None:
        writable(out, "--out")
    made = card_of(run, repo, licence_override)
    if out is None:
        sys.stdout.write(made.text)
    else:
        out.write_text(made.text, encoding="utf-8")


def push(
    run: RunArg,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
    revision: Annotated[str, typer.Option(help="The branch.")] = "main",
    message: Annotated[str, typer.Option(help="The commit's.")] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, whoever put it there.")
    ] = False,
    licence_override: Licence = "",
):
    """Upload a finished run's student to the Hub; the token is HF_TOKEN's or `hf auth login`'s."""
    from distill.console import out as console
    from distill.publish.push import push as go

    done = go(
        run,
        repo,
        private=private,
        revision=revision,
        message=message,
        overwrite=overwrite,
        licence_override=licence_override,
    )
    console.print(
        f"{done.sent} files sent, {done.deleted} deleted, {done.present} there already: "
        f"{done.url} at {done.commit[:7]}",
        soft_wrap=True,
    )


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            callback=at_home, help="An EDM network, FILE.pkl; or a student or its run's folder."
        ),
    ],
    to: Annotated[
        Path,
        typer.Argument(
            callback=at_home, help="A new folder for the network; FILE.safetensors for a student."
        ),
    ],
):
    """Turn a pickled EDM network into a folder, or a student into one file for other programs."""
    from distill.console import out as console

    if source.is_dir():
        from students.export.single_file import export_single
        from teachers.errors import UserError

        writable(to, "convert")
        if to.suffix != ".safetensors" or to.exists():
            raise UserError(f"convert {to}: expected the name of a new .safetensors file")
        export_single(source, to)
        console.print(f"student in {to}; its scheduler stays in {source}", soft_wrap=True)
        return
    from teachers.edm.checkpoints import convert as write

    write(source.expanduser(), to.expanduser())
    console.print(f"teacher in {to}", soft_wrap=True)
