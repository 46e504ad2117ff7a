"""`distill run`, `teach`, `bench`, `cache`: what trains, and what is made once for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import Licence, Out, Overrides, RecipeArg, Resume, at_home, counts


def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    licence_override: Licence = "",
):
    """Distil: train the student of a recipe, export it, and measure it against its teacher.

    Exit code 0 once the student is exported and measured. What could not be made beside it (a LoRA
    file, the card, pictures, the report) is said on stderr and in summary.json's `failed`, and
    --resume tries it again; exit code 1 if the student or its figures are missing.
    """
    import json

    from distill.console import out as console
    from distill.console import waiting
    from teachers.errors import UserError, intact

    out = out or Path("runs") / Path(recipe).stem
    with waiting("distill: preparing"):  # the imports alone take seconds
        from distill.config.recipe import Recipe

        reason = [f"export.licence_override={json.dumps(licence_override)}"]
        checked = Recipe.load(recipe, [*(overrides or []), *(reason if licence_override else [])])
        if not checked.kind.few_step:
            name = checked.objective["name"]
            raise UserError(f"{recipe}: objective.name: {name} makes teachers; use distill teach")
        from distill.training import build, run_folder

        made = None
        with intact(out / "summary.json"):
            done = resume and complete(out) and not more_steps(out, checked.train.steps)
        if done:
            run_folder.check_folder(checked, out, resume)
        else:
            made = build.build(checked, out, resume)
    if made is None:
        console.print(f"{out} is finished; its figures:")
        with intact(out / "summary.json"):
            return show(out)
    from distill.evaluation.finish import finish

    main = made.engine.accelerator.is_main_process
    if main:
        introduce(made)
    made.engine.train()
    if main and made.protocol:
        console.print("exporting and measuring")
    summary = finish(made)
    if main:
        show(out)
        tell_failed(summary["failed"], out)


def introduce(made: Any) -> None:
    """Say of a run that begins what it trains, from which teacher, and where."""
    from distill.console import out as console
    from distill.sampling.guided_teacher import guided
    from teachers.guidance import describe

    recipe = made.recipe
    guidance = describe(guided(recipe.teacher, made.teacher))
    console.print(
        f"{recipe.objective['name']}: from teacher {recipe.teacher.source} ({guidance}) "
        f"to a student of {counts(made.student)}, in {made.out}",
        soft_wrap=True,
    )


def complete(out: Path) -> bool:
    """Whether the run came to its end with all that it leaves."""
    import json

    from distill.evaluation.finish import failed, finished

    return finished(out) and not failed(
        json.loads((out / "summary.json").read_text(encoding="utf-8"))
    )


def tell_failed(failed: dict[str, str], out: Path) -> None:
    """Close with what is missing; each was said as it failed.

    Raises:
        Exit: with 1, where the figures are.
    """
    from distill.attempts import FIGURES, LOG
    from distill.console import notice

    if failed:
        notice(
            f"not made: {', '.join(failed)}; the student is there; --resume tries again "
            f"({out / LOG} says more)"
        )
    if FIGURES in failed:
        notice(f"{FIGURES}: {failed[FIGURES]}")  # last, where a benchmark looks for the reason
        raise typer.Exit(1)


def more_steps(out: Path, steps: int) -> bool:
    """Whether the recipe now asks for more steps than the finished run took."""
    import json

    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["steps"] < steps


def show(out: Path) -> None:
    """The run's results, and where the student is."""
    import json

    from distill.console import out as console
    from distill.console import results
    from distill.publish.results_table import rows_of

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if metrics := summary["metrics"]:
        rows = rows_of(metrics)
        taught = [row for row in rows if not row.ours]
        shown = {v.name: {**v.figures, "evaluations": v.evaluations} for v in [*taught, *rows]}
        one = rows[0].figures
        title = f"{one['protocol']}: {one['n']:,} samples" + "; ± over seeds" * (one["seeds"] > 1)
        console.print(results(title, shown, next(iter(shown)) if "teacher" in metrics else None))
    elif "figures" in summary.get("failed", {}):
        console.print("not measured: the measuring failed")
    else:
        console.print("not measured: the recipe names no eval.protocol")
    console.print(
        f"{summary['steps']} steps in {summary['wall_s']:.0f} s, "
        f"{summary['network_evaluations']:,} network evaluations; student in {out / 'student'}, "
        f"report in {out / 'report.html'}",
        soft_wrap=True,
    )


def teach(recipe: RecipeArg, overrides: Overrides = None, out: Out = None, resume: Resume = False):
    """Train a small teacher from nothing, and leave it as an ordinary diffusers folder."""
    from distill.console import out as console
    from distill.console import results
    from distill.pretrain.pixels import teach as go

    out = out or Path("runs") / f"teach-{Path(recipe).stem}"
    summary = go(recipe, out, overrides or [], resume)
    if summary.get("metrics"):
        metrics = summary["metrics"]
        rows = {f"{metrics['teacher']['steps']} steps": metrics["teacher"]}
        rows |= {f"{k} steps": v for k, v in metrics["teacher_few"].items()}
        console.print(results("teacher", rows, base=next(iter(rows))))
    console.print(f"teacher in {out / 'teacher'}")


def bench(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped one: bench/digits.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as seeds=[0] budget.network_evaluations=20000.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="Its folder.", show_default="runs/bench-RECIPE"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
):
    """Race objectives at one budget: every row and seed a run, then a leaderboard and plots.

    Called again, it goes on where it was: what is finished is kept, and what failed too, until its
    row changes. OUT gets leaderboard.json, leaderboard.md and plots; OUT/runs, every run. Exit code
    1 if not one run came through.
    """
    from distill.console import notice, waiting
    from distill.console import out as console

    out = out or Path("runs") / f"bench-{Path(recipe).stem}"
    with waiting("distill: preparing"):
        from distill.benchmark import runner
    lines = runner.bench(recipe, overrides or [], out, jobs)
    failed = {v.name for v in lines if v.failed}
    console.print(runner.standings(lines))
    note = f"; failed: {', '.join(sorted(failed))}" if failed else ""
    console.print(f"leaderboard and plots in {out}{note}", soft_wrap=True, markup=False)
    if not any(v.metrics for v in lines if v.kind == "student"):
        notice(f"every run failed; {out / 'leaderboard.md'} says why, {out / 'logs'} more")
        raise typer.Exit(1)


def cache(recipe: RecipeArg, overrides: Overrides = None):
    """Encode a recipe's prompts and images once, into a cache that its runs read."""
    from distill.config.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    from distill.console import say
    from distill.training.build import make_cache

    report = make_cache(checked)
    kinds = ", ".join(f"{n} {kind}" for kind, n in report["by_kind"].items())
    skipped = f"; {report['skipped']} skipped ({kinds}), see data-report.json" if kinds else ""
    say(f"{report['items'] - report['skipped']:,} items cached{skipped}")
