"""`distill run`, `teach`, `bench`, `cache`, `pairs`: what trains, or prepares training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import (
    Licence,
    Out,
    Overrides,
    RecipeArg,
    Resume,
    expand_home,
    step_counts,
)


def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    licence_override: Licence = "",
):
    """Train the student of a recipe, export it, and measure it against its teacher.

    Exit code 0 if the student is exported and measured. If another part fails (LoRA files, card,
    images, report), stderr and summary.json's `failed` name it, and --resume tries it again. Exit
    code 1 if the student or its metrics are missing.
    """
    import json

    from distill.console import out as console
    from distill.console import spinner
    from teachers.errors import UserError, intact

    out = out or Path("runs") / Path(recipe).stem
    with spinner("distill: preparing"):  # the imports take seconds
        from distill.config.recipe import Recipe

        reason = [f"export.licence_override={json.dumps(licence_override)}"]
        checked = Recipe.load(recipe, [*(overrides or []), *(reason if licence_override else [])])
        if not checked.kind.few_step:
            name = checked.objective["name"]
            raise UserError(f"{recipe}: objective.name: {name} makes no student; use distill teach")
        from distill.training import build, run_folder

        new_run = None
        with intact(out / "summary.json"):
            done = resume and complete(out) and not goes_on(out, checked)
        if done:
            run_folder.check_folder(checked, out, resume)
        else:
            new_run = build.build(checked, out, resume)
    if new_run is None:
        console.print(f"{out} is finished; its results:")
        with intact(out / "summary.json"):
            return show(out)
    from distill.evaluation.finish import finish

    main = new_run.engine.accelerator.is_main_process
    if main:
        print_header(new_run)
        use_plan(new_run)
    new_run.engine.train()
    if main and new_run.protocol:
        console.print("exporting and measuring")
    summary = finish(new_run)
    if main:
        show(out)
        report_failures(summary["failed"], out)


def print_header(new_run: Any) -> None:
    """Print the objective, the teacher, the student's step counts and the folder of a new run."""
    from distill.console import out as console
    from distill.sampling.guided_teacher import guided
    from teachers.guidance import describe

    recipe = new_run.recipe
    guidance = describe(guided(recipe.teacher, new_run.teacher))
    console.print(
        f"{recipe.objective['name']}: from teacher {recipe.teacher.source} ({guidance}) "
        f"to a student of {step_counts(new_run.student)}, in {new_run.out}",
        soft_wrap=True,
    )


def use_plan(new_run: Any) -> None:
    """Let progress lines compare memory with the plan that `distill plan` made of this recipe."""
    from distill.planning import kept

    engine, recipe = new_run.engine, new_run.recipe
    if engine.accelerator.device.type == "cuda" and engine.shards == recipe.train.accumulate:
        engine.speed.planned_gb = kept.peak_gb(recipe)


def complete(out: Path) -> bool:
    """Whether the run finished and no part of its results failed."""
    import json

    from distill.evaluation.finish import failed, finished

    return finished(out) and not failed(
        json.loads((out / "summary.json").read_text(encoding="utf-8"))
    )


def report_failures(failed: dict[str, str], out: Path) -> None:
    """Name the parts that failed; each failure was already reported when it happened.

    Raises:
        Exit: with code 1, if the metrics are among them.
    """
    from distill.attempts import FIGURES, LOG
    from distill.console import print_notice

    if failed:
        print_notice(
            f"not made: {', '.join(failed)}; the student is exported; --resume tries again "
            f"(details in {out / LOG})"
        )
    if FIGURES in failed:
        print_notice(f"{FIGURES}: {failed[FIGURES]}")  # last, where a benchmark reads the cause
        raise typer.Exit(1)


def goes_on(out: Path, recipe: Any) -> bool:
    """Whether the recipe now trains for longer than the finished run did.

    A run that ended before its last step goes on once the rule that ended it is gone or, of hours,
    has more of them.
    """
    import json

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    ended, hours = summary.get("ended"), recipe.train.hours
    over = {
        "flat": recipe.eval.stop_when_flat is not None,
        "hours": hours is not None and summary["wall_s"] >= 3600 * hours,
    }
    guarded = recipe.train.guards is not None and bool(summary.get("guards", {}).get("reason"))
    return summary["steps"] < recipe.train.steps and not (guarded or over.get(ended, False))


def show(out: Path) -> None:
    """Print a finished run's results and where its student and report are."""
    import json

    from distill.attempts import FIGURES
    from distill.console import out as console
    from distill.console import results_table
    from distill.publish.results_table import not_held_out, rows_of

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    metrics = summary["metrics"]
    if "metric" in metrics:  # one of the user's own
        from distill.sampling.own_metric import table_of

        console.print(table_of(metrics))
    elif metrics:
        rows = rows_of(metrics)
        teachers = [row for row in rows if not row.is_student]
        table = {v.name: {**v.figures, "evaluations": v.evaluations} for v in [*teachers, *rows]}
        first = rows[0].figures
        title = f"{first['protocol']}: {first['n']:,} samples"
        title += "; ± over seeds" * (first["seeds"] > 1)
        console.print(
            results_table(title, table, next(iter(table)) if "teacher" in metrics else None)
        )
        if line := not_held_out(summary):
            console.print(line)
    elif FIGURES in summary.get("failed", {}):
        console.print("not measured: the measurement failed")
    else:
        console.print("not measured: the recipe has no eval.protocol and no eval.metric")
    console.print(
        f"{summary['steps']} steps in {summary['wall_s']:.0f} s, "
        f"{summary['network_evaluations']:,} network evaluations; student in {out / 'student'}"
        + (f", report in {out / 'report.html'}" if (out / "report.html").exists() else ""),
        soft_wrap=True,
    )


TeachOut = Annotated[
    Path | None,
    typer.Option(callback=expand_home, help="The run's folder.", show_default="runs/teach-RECIPE"),
]


# Rows of the table of `distill teach`, by the names of their figures.
ALONE = {
    "teacher_alone": "without the discriminator",
    "guide": "one evaluation with the guide",
    "base": "one evaluation without it",
}


def teach(
    recipe: RecipeArg, overrides: Overrides = None, out: TeachOut = None, resume: Resume = False
):
    """Train a small teacher from scratch, and save it as a diffusers folder.

    A recipe with a teacher and the objective discriminator trains a discriminator of that teacher,
    which strengthens it: OUT/critic.safetensors, for the key teacher.discriminator of recipes. One
    with the objective decoder trains a light decoder of a student: OUT/student is the student with
    it. One with tinyfusion or ecodiff learns what can go: OUT/pruned is the teacher without it. One
    with ilf trains what carries a UNet's inner levels on from step to step: OUT/student is the
    teacher with it. One with guide trains a ControlNet that takes the place of guidance: OUT/guided
    is the teacher with it.
    """
    from distill.console import out as console
    from distill.console import results_table
    from distill.pretrain.guide import NAME as GUIDED
    from distill.pretrain.pixels import teach as train_teacher
    from distill.sampling.discriminator import NAME

    out = out or Path("runs") / f"teach-{Path(recipe).stem}"
    summary = train_teacher(recipe, out, overrides or [], resume)
    if (metrics := summary.get("metrics")) and "teacher" in metrics:
        rows = {f"{metrics['teacher']['steps']} steps": metrics["teacher"]}
        rows |= {f"{k} steps": v for k, v in metrics.get("teacher_few", {}).items()}
        for name, words in ALONE.items():
            if name in metrics:
                rows[words] = metrics[name]
        console.print(results_table("teacher", rows, base=next(iter(rows))))
    if summary.get("objective") == "decoder":
        show_decoder(summary, out)
    elif "shown" in summary:
        show_figures(summary["metrics"], ("whole", "pruned"))
        for part in summary["shown"]:
            console.print(part)
    elif summary.get("objective") == "ilf":
        show_feedback(summary, out)
    elif summary.get("objective") == "guide":
        counts = summary["guide"]
        console.print(
            f"guide: {counts['guide']:,} weights beside {counts['base']:,}; in {out / GUIDED}",
            soft_wrap=True,
        )
    elif summary.get("objective") == "discriminator":
        console.print(f"discriminator in {out / NAME}")
    else:
        console.print(f"teacher in {out / 'teacher'}")


def show_feedback(summary: dict[str, Any], out: Path) -> None:
    """Print the figures with carried levels, with kept ones and of whole steps, and the folder."""
    from distill.console import out as console
    from distill.console import results_table
    from distill.pretrain.decoder import NAME

    kinds = {"student": "carried", "against": "kept", "fewer": "whole"}
    metrics = summary["metrics"].items()
    rows = {f"{kinds[kind]}, {k} steps": v for kind, found in metrics for k, v in found.items()}
    if rows:
        console.print(results_table("teacher", rows, base=next(iter(rows))))
    console.print(f"teacher in {out / NAME}")


def show_decoder(summary: dict[str, Any], out: Path) -> None:
    """Print what a light decoder gains and costs, and where its pipeline is."""
    from distill.console import print_line
    from distill.pretrain.decoder import NAME

    found = summary["decoder"]
    show_figures(summary["metrics"], ("large decoder", "light decoder"))
    light, large = found["weights"]["light"], found["weights"]["large"]
    faster = found["seconds"]["large"] / found["seconds"]["light"]
    print_line(
        f"light decoder: {light:,} weights instead of {large:,}, {faster:.1f}× as fast, "
        f"{found['psnr_db']:.1f} dB of the large one's pictures; student in {out / NAME}"
    )


def show_figures(metrics: dict[str, Any], names: tuple[str, str]) -> None:
    """Print a student's figures before a part of it was replaced and after, if it was measured."""
    from distill.console import out as console
    from distill.console import results_table

    rows = {f"{who}, {k} step{'s' * (k != '1')}": v
            for who, name in zip(names, ("against", "student"), strict=True)
            for k, v in metrics.get(name, {}).items()}  # fmt: skip
    if rows:
        console.print(results_table("student", rows, base=next(iter(rows))))


def bench(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped one, such as bench/digits.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change, such as seeds=[0] budget.network_evaluations=20000."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=expand_home, help="The benchmark's folder.", show_default="runs/bench-RECIPE"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs to train at the same time.")] = 1,
):
    """Compare objectives at one training budget: train every row with every seed, then rank them.

    The same command continues a stopped benchmark. Finished runs are kept; failed runs are kept
    too, until their row changes. OUT holds leaderboard.json, leaderboard.md and plots; OUT/runs
    holds the runs. Exit code 1 if every run failed.
    """
    from distill.console import out as console
    from distill.console import print_notice, spinner

    out = out or Path("runs") / f"bench-{Path(recipe).stem}"
    with spinner("distill: preparing"):
        from distill.benchmark import runner
    lines = runner.bench(recipe, overrides or [], out, jobs)
    failed = {v.name for v in lines if v.failed}
    console.print(runner.standings(lines))
    failures = f"; failed: {', '.join(sorted(failed))}" if failed else ""
    console.print(f"leaderboard and plots in {out}{failures}", soft_wrap=True, markup=False)
    if not any(v.metrics for v in lines if v.kind == "student"):
        print_notice(
            f"every run failed; see {out / 'leaderboard.md'}, and {out / 'logs'} for details"
        )
        raise typer.Exit(1)


def cache(recipe: RecipeArg, overrides: Overrides = None):
    """Encode a recipe's prompts and images into the cache that its runs read."""
    from distill.config.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    from distill.console import print_line
    from distill.training.build import make_cache

    report = make_cache(checked)
    kinds = ", ".join(f"{n} {kind}" for kind, n in report["by_kind"].items())
    skipped = f"; {report['skipped']} skipped ({kinds}), see data-report.json" if kinds else ""
    print_line(f"{report['items'] - report['skipped']:,} items cached{skipped}")


def pairs(
    source: Annotated[
        str,
        typer.Argument(help="A teacher, as in a recipe; or a recipe, for its teacher and data."),
    ],
    out: Annotated[Path, typer.Option(callback=expand_home, help="The folder of the pairs.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="How many pairs.", show_default="8192")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="heun, dpmpp_2m, ddim or euler.", show_default="heun")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Its steps.", show_default="18")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="The teacher's guidance scale; 1 is none.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts, as data.prompts in a recipe.")
    ] = None,
    inverted: Annotated[
        int | None, typer.Option(min=0, help="Further pairs: data, and the noise they lead to.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="The data of these, as data.source in a recipe.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise.", show_default="0")] = None,
):
    """Make pairs of noise and the teacher's sample from it, for objectives that learn from pairs.

    The same command goes on where it was stopped. Under `accelerate launch`, each process makes a
    part of the files; the pairs do not depend on the number of processes.
    """
    from distill.console import print_line, spinner

    given = {"count": count, "solver": solver, "steps": steps, "prompts": prompts,
             "inverted": inverted, "images": images}  # fmt: skip
    with spinner("distill: preparing"):
        from distill.data.encode import device
        from distill.pairs.folder import fill
        from distill.pairs.settings import recipe_of, settings_of
        from distill.sampling.guided_teacher import load_teacher

        settings = settings_of(recipe_of(source, given, guidance, seed))
        teacher = load_teacher(settings.teacher)
        teacher.denoiser.to(device())
    index = fill(out, settings, teacher)
    print_line(
        f"{index['pairs']:,} pairs in {out}, {index['evaluations']:,} network evaluations; learn "
        f"from them with data.source=pairs data.path={out}"
    )
