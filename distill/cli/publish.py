"""`distill report`, `compare`, `card`, `push`, `convert`: files made from a finished run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import Licence, RunArg, check_writable, expand_home


def report(
    run: RunArg,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=expand_home, help="The file to write.", show_default="RUN/report.html"
        ),
    ] = None,
):
    """Write a finished run's HTML report: result, images, curves, metrics and cost on one page."""
    from distill.console import out as console
    from distill.report.page import report as write_report

    if out is not None:
        check_writable(out, "--out")
    console.print(f"report in {write_report(run, out)}", soft_wrap=True, markup=False)


def compare(
    run: RunArg,
    reference: Annotated[
        str | None,
        typer.Argument(
            help="A shipped reference, a reference file or another run's folder; "
            "default: the shipped one of the run's recipe."
        ),
    ] = None,
):
    """Show where a run's training curves leave the range of known-good runs of its recipe."""
    from distill.console import out as console
    from distill.report import curves
    from teachers.errors import UserError

    curves.recipe_tree(run)  # refuses a run whose recipe.yaml is missing or damaged
    series, good = curves.series(run), curves.reference_for(run, reference)
    if not (steps := curves.shared_steps(series, good)):
        raise UserError(
            f"{run / 'metrics.jsonl'}: the run and {good.recipe} have no logged step in common; "
            "use the same train.log_every, or train for more steps"
        )
    deviations = curves.deviations(series, good)
    for deviation in deviations:
        console.print(str(deviation), soft_wrap=True, markup=False)
    verdict = "every curve stays in its band"
    if deviations:
        verdict = f"{len(deviations)} of {len(good.bands)} curves leave their bands"
    console.print(
        f"{verdict} ({steps} logged steps; {good.recipe}, {good.runs} runs)",
        soft_wrap=True,
        markup=False,
    )


def card(
    run: RunArg,
    out: Annotated[
        Path | None,
        typer.Option(callback=expand_home, help="The file to write.", show_default="stdout"),
    ] = None,
    repo: Annotated[
        str, typer.Option(help="The Hub repository that the card's code snippet loads.")
    ] = "",
    licence_override: Licence = "",
):
    """Write the model card of a finished run."""
    from distill.console import print_line
    from distill.publish.card import card as card_of

    if out is not None:
        check_writable(out, "--out")
    text = card_of(run, repo, licence_override).text
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
        print_line(f"wrote {out}")


def push(
    run: RunArg,
    repo: Annotated[str, typer.Argument(help="The Hub repository, OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.")
    ] = False,
    revision: Annotated[str, typer.Option(help="The branch to push to.")] = "main",
    message: Annotated[str, typer.Option(help="The commit message.")] = "",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace all files in the repository, whoever made them."),
    ] = False,
    licence_override: Licence = "",
):
    """Upload a finished run's student to the Hub.

    The token comes from HF_TOKEN or `hf auth login`.
    """
    from distill.console import out as console
    from distill.publish.push import push as upload

    pushed = upload(
        run,
        repo,
        private=private,
        revision=revision,
        message=message,
        overwrite=overwrite,
        licence_override=licence_override,
    )
    console.print(
        f"{pushed.uploaded} files uploaded, {pushed.deleted} deleted, {pushed.unchanged} "
        f"unchanged: {pushed.url} at {pushed.commit[:7]}",
        soft_wrap=True,
    )


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            callback=expand_home,
            help="A pickled EDM network (FILE.pkl), a student folder or a run's folder.",
        ),
    ],
    to: Annotated[
        Path,
        typer.Argument(
            callback=expand_home,
            help="A new folder for an EDM network; FILE.safetensors for a student.",
        ),
    ],
):
    """Convert a pickled EDM network to a folder of safetensors, or a student to a single file."""
    from distill.console import out as console

    if source.is_dir():
        from distill.publish.licence import licence_of
        from students.export.folder import student_folder
        from students.export.single_file import export_single
        from teachers.errors import UserError

        check_writable(to, "convert")
        if to.suffix != ".safetensors" or to.exists():
            raise UserError(f"convert {to}: expected the name of a new .safetensors file")
        export_single(source, to, licence=lambda teacher: licence_of(teacher).label)
        console.print(
            f"student in {to}; its scheduler stays in {student_folder(source)}/scheduler",
            soft_wrap=True,
        )
        return
    from teachers.edm.checkpoints import convert as convert_network

    convert_network(source.expanduser(), to.expanduser())
    console.print(f"teacher in {to}", soft_wrap=True)
