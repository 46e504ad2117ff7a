"""The command line: `distill COMMAND`; see `distill --help`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a pretrained diffusion or flow model into a one- to four-step generator.",
)

RecipeArg = Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe: digits/dmd2.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Such as train.steps=500.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/RECIPE")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
Licence = Annotated[
    str, typer.Option("--licence-override", help="Why it may be shared though its licence says no.")
]
Student = Annotated[Path, typer.Argument(help="A run's folder, or the student folder in it.")]


@app.command()
def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    licence_override: Licence = "",
):
    """Distil: train the student of a recipe, export it, and measure it against its teacher."""
    import json

    from distill.terminal import out as console
    from distill.terminal import waiting
    from teachers.errors import UserError

    out = out or Path("runs") / Path(recipe).stem
    with waiting("distill: preparing"):  # the imports alone take seconds
        from distill.recipe import Recipe

        reason = [f"export.licence_override={json.dumps(licence_override)}"]
        checked = Recipe.load(recipe, [*(overrides or []), *(reason if licence_override else [])])
        if not checked.kind.few_step:
            name = checked.objective["name"]
            raise UserError(f"{recipe}: objective.name: {name} makes teachers; use distill teach")
        from distill import build
        from distill.finish import finished

        made = None
        if finished(out) and resume and not more_steps(out, checked.train.steps):
            build.check_folder(checked, out, resume)
        else:
            made = build.build(checked, out, resume)
    if made is None:
        console.print(f"{out} is finished; its figures:")
        return show(out)
    main = made.engine.accelerator.is_main_process
    if main:
        from distill.teaching import guided
        from teachers.guidance import describe

        guidance = describe(guided(checked, made.teacher))
        console.print(
            f"{checked.objective['name']}: from teacher {checked.teacher.source} ({guidance}) "
            f"to a student of {counts(made.student)}, in {out}",
            soft_wrap=True,
            markup=False,
        )
    from distill.finish import finish

    made.engine.train()
    if main and made.protocol:
        console.print("exporting and measuring")
    finish(made)
    if main:
        show(out)


def more_steps(out: Path, steps: int) -> bool:
    """Whether the recipe now asks for more steps than the finished run took."""
    import json

    return json.loads((out / "summary.json").read_text())["steps"] < steps


def show(out: Path) -> None:
    """The run's results, and where the student is."""
    import json

    from distill.terminal import out as console
    from distill.terminal import results

    summary = json.loads((out / "summary.json").read_text())
    if metrics := summary["metrics"]:
        rows, base, few = {}, None, metrics.get("teacher_few", {})
        if full := metrics.get("teacher"):
            base = f"teacher, {full['steps']}-step {full['solver']}"
            rows[base] = full
        rows |= {f"teacher, {k} step{'s' * (k != '1')}": v for k, v in few.items()}
        rows |= {f"student, {k} step{'s' * (k != '1')}": v for k, v in metrics["student"].items()}
        any_row = full or next(iter(metrics["student"].values()))
        title = f"{any_row['protocol']}: {any_row['n']} samples; ± over seeds"
        console.print(results(title, rows, base))
    else:
        console.print("not measured: the recipe names no eval.protocol")
    console.print(
        f"{summary['steps']} steps in {summary['wall_s']:.0f} s, "
        f"{summary['network_evaluations']:,} network evaluations; student in {out / 'student'}, "
        f"report in {out / 'report.html'}",
        soft_wrap=True,
    )


@app.command()
def sample(
    student: Student,
    out: Annotated[Path, typer.Option(help="A .png grid, or .npz with images and labels.")],
    steps: Annotated[int, typer.Option(help="One of the counts it was trained for.")] = 1,
    n: Annotated[int, typer.Option("--n", help="How many pictures.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="The stock pipeline's generator seed.")] = 0,
    labels: Annotated[str | None, typer.Option(help="Such as 3, or 0,1,2: repeated to n.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For text students; may be repeated, and is up to n.")
    ] = None,
):
    """Draw pictures from a student: those that the stock pipeline draws for the same seed."""
    from distill.terminal import waiting
    from students.export import draw, load_student
    from teachers.errors import UserError

    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: expected a name that ends in .png or .npz")
    writable(out, "--out")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")
    generator, teacher = load_student(student)
    if steps not in generator.counts:
        raise UserError(f"--steps {steps}: this student was trained for {counts(generator)}")
    classes = getattr(teacher.codec, "classes", 0)
    if labels is not None and not classes:
        raise UserError("--labels: this student is not class-conditional")
    text = not classes and teacher.codec.condition([""]) is not None
    if text and not prompt:
        raise UserError(
            '--prompt is missing: this student draws what it is told, as in --prompt "…"'
        )
    if prompt and not text:
        raise UserError("--prompt: this student does not read text")
    names = [str(i) for i in range(classes or 1)]
    if labels or prompt:
        names = prompt or [p.strip() for p in str(labels).split(",")]
    wanted = [names[i % len(names)] for i in range(n)]
    teacher.codec.condition(wanted)
    with waiting(f"drawing {n} pictures in {steps} step{'s' * (steps != 1)}"):
        images = teacher.codec.decode(draw(generator.at(steps), teacher, wanted, seed))
    if out.suffix == ".npz":
        import numpy as np

        from eval.samples import to_uint8

        np.savez(
            out,
            images=to_uint8(images).numpy(),
            labels=np.array(wanted if text else [int(p) for p in wanted]),
        )
    else:
        from distill.pictures import save_grid

        save_grid(images, out, len(names) if 6 <= len(names) <= 16 else min(n, 8))


def writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before any work is done for it."""
    from teachers.errors import UserError

    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written")


def counts(generator: Any) -> str:
    """The step counts that a student runs at: "1 step", or "1, 2 or 4 steps"."""
    *most, last = map(str, generator.counts)
    return f"{', '.join(most)} or {last} steps" if most else f"{last} step{'s' * (last != '1')}"


@app.command(name="eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="A student or its run's folder, or a teacher.")],
    protocol: Annotated[str, typer.Option(help="How to measure; see distill list.")] = "digits",
    steps: Annotated[str, typer.Option(help="Such as 1,2,4; all of a student's, by default.")] = "",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many, from 0; the protocol's by default.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A teacher to measure beside it, from the same noise.")
    ] = None,
    against_steps: Annotated[int, typer.Option(min=1, help="And in how many steps.")] = 18,
    solver: Annotated[
        str, typer.Option(help="Teachers': one of ours, or a scheduler class of diffusers.")
    ] = "heun",
    guidance: Annotated[float, typer.Option(help="Teachers': g = 1 + w; 1 is none.")] = 1.0,
    null_label: Annotated[int | None, typer.Option(help="Teachers': the null class.")] = None,
    schedule: Annotated[
        str, typer.Option(help="Our solvers' times: own, ays, gits or searched.")
    ] = "own",
    adaptive: Annotated[
        float | None, typer.Option(help="Guide until both predictions have this cosine, as 0.991.")
    ] = None,
    cache: Annotated[
        int, typer.Option(min=1, help="DeepCache: run a UNet whole in every so many calls.")
    ] = 1,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures here; seeds that are in it are kept."),
    ] = None,
):
    """Measure a student or a teacher by a protocol, at the step counts given."""
    import json

    from accelerate import PartialState

    from distill import evaluation
    from distill.encode import device as device_of
    from distill.files import write
    from distill.terminal import out as console
    from distill.terminal import results
    from eval.protocol import protocol as protocol_of
    from eval.stream import Processes
    from teachers.errors import UserError

    measure = protocol_of(protocol)
    if json_file is not None:
        writable(json_file, "--json")
    wanted = [k.strip() for k in steps.split(",")] if steps else []
    if bad := next((k for k in wanted if not k.isdecimal() or not int(k)), None):
        raise UserError(f"--steps {bad}: expected whole numbers from 1, such as 1,2,4")
    state, device = PartialState(), device_of()
    processes = Processes(state.process_index, state.num_processes)
    how = {"solver": solver, "guidance": guidance, "null_label": null_label}
    if evaluation.is_student(source):
        found = evaluation.student(source, device)
    else:
        few = {"schedule": schedule, "adaptive": adaptive, "cache": cache}
        found = evaluation.teacher(source, device, **how, **few)
    counts = [int(k) for k in wanted] or list(found.counts or (1, 2, 4))
    found.check(counts)
    other = None if against is None else evaluation.teacher(against, device, **how)
    if other is not None:
        evaluation.check_against(found, other)
    record = json_file and json_file.with_name(f"{json_file.name}.seeds")
    n = measure.seeds if seeds is None else seeds
    rows = evaluation.evaluate(found, measure, counts, n, processes, record)
    tree: dict[str, Any] = {"protocol": protocol, found.who: rows}
    shown = {evaluation.title(found.who, k, v): v for k, v in rows.items()}
    base = None
    if other is not None:
        beside = json_file and json_file.with_name(f"{json_file.name}.against")
        for k in counts:
            near = evaluation.agreement(found, other, measure.prompts, k, against_steps)
            rows[str(k)].update(near)
        full = evaluation.evaluate(other, measure, [against_steps], n, processes, beside)
        tree["against"] = full
        base = f"{against}, {against_steps} step{'s' * (against_steps != 1)}"
        shown = {base: full[str(against_steps)], **shown}
    if processes.rank:
        return
    title = f"{protocol}: {len(measure.prompts):,} samples, {n} seeds; ± over seeds"
    console.print(results(title, shown, base=base))
    if json_file is not None:
        write(json_file, json.dumps(tree, indent=2) + "\n")
        for kept in (record, json_file.with_name(f"{json_file.name}.against")):
            kept and kept.unlink(missing_ok=True)


@app.command()
def teach(recipe: RecipeArg, overrides: Overrides = None, out: Out = None, resume: Resume = False):
    """Train a small teacher from nothing, and leave it as an ordinary diffusers folder."""
    from distill.teach import teach as go
    from distill.terminal import out as console
    from distill.terminal import results

    out = out or Path("runs") / f"teach-{Path(recipe).stem}"
    summary = go(recipe, out, overrides or [], resume)
    if summary.get("metrics"):
        metrics = summary["metrics"]
        rows = {f"{metrics['teacher']['steps']} steps": metrics["teacher"]}
        rows |= {f"{k} steps": v for k, v in metrics["teacher_few"].items()}
        console.print(results("teacher", rows, base=next(iter(rows))))
    console.print(f"teacher in {out / 'teacher'}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="An EDM network, FILE.pkl; or a student or its run's folder.")
    ],
    to: Annotated[
        Path, typer.Argument(help="A new folder for the network; FILE.safetensors for a student.")
    ],
):
    """Turn a pickled EDM network into a folder, or a student into one file for other programs."""
    from distill.terminal import out as console

    if source.is_dir():
        from students.single import export_single
        from teachers.errors import UserError

        writable(to, "convert")
        if to.suffix != ".safetensors" or to.exists():
            raise UserError(f"convert {to}: expected the name of a new .safetensors file")
        export_single(source, to)
        console.print(f"student in {to}; its scheduler stays in {source}", soft_wrap=True)
        return
    from teachers.edm_files import convert as write

    write(source.expanduser(), to.expanduser())
    console.print(f"teacher in {to}", soft_wrap=True)


RunArg = Annotated[Path, typer.Argument(help="A finished run's folder.")]


@app.command()
def card(
    run: RunArg,
    out: Annotated[Path | None, typer.Option(help="A file to write it to.")] = None,
    repo: Annotated[str, typer.Option(help="The Hub id that its snippet loads.")] = "",
    licence_override: Licence = "",
):
    """Write the model card of a finished run."""
    from students.card import card as card_of

    if out is not None:
        writable(out, "--out")
    made = card_of(run, repo, licence_override)
    if out is None:
        sys.stdout.write(made.text)
    else:
        out.write_text(made.text)


@app.command()
def report(
    run: RunArg,
    out: Annotated[Path | None, typer.Option(help="Instead of RUN/report.html.")] = None,
):
    """Write a finished run's report: verdict, pictures, curves, figures and cost on one page."""
    from distill.report import report as write
    from distill.terminal import out as console

    if out is not None:
        writable(out, "--out")
    console.print(f"report in {write(run, out)}", soft_wrap=True, markup=False)


@app.command()
def compare(
    run: RunArg,
    reference: Annotated[
        str | None, typer.Argument(help="A shipped reference, a file, or another run's folder.")
    ] = None,
):
    """Say where a run's curves leave the band of known-good runs of its recipe."""
    from distill import curves
    from distill.terminal import out as console

    found, good = curves.series(run), curves.reference_for(run, reference)
    left = curves.departures(found, good)
    for departure in left:
        console.print(str(departure), soft_wrap=True, markup=False)
    kept = "every curve keeps to its band"
    console.print(
        f"{len(left)} of {len(good.bands)} curves leave their bands" if left else kept,
        f"({curves.compared(found, good)} logged steps; {good.recipe}, {good.runs} runs)",
        soft_wrap=True,
        markup=False,
    )


@app.command()
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
    from distill.push import push as go
    from distill.terminal import out as console

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


@app.command()
def doctor(
    teacher: Annotated[str, typer.Argument(help="As a recipe names it, or file.py:function.")],
    image: Annotated[
        Path | None, typer.Option(help="A picture such as it was trained on, or a folder of them.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.")] = None,
    null_label: Annotated[
        int | None, typer.Option(min=0, help="The class that means none, if there is one.")
    ] = None,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Leave out what needs trained weights.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the checks here.")] = None,
):
    """Examine a teacher's adapter before money is spent on it; exit 2 at a broken promise."""
    import json
    from dataclasses import asdict

    import torch

    from distill.doctor import diagnose, pictures_for, table, verdict
    from distill.sources import examples
    from distill.terminal import out as console
    from teachers.errors import UserError
    from teachers.teacher import EMBEDDED, load

    if json_file is not None:
        writable(json_file, "--json")
    loaded = load(teacher, **({} if null_label is None else {"null_label": null_label}))
    if torch.cuda.is_available():
        loaded.denoiser.to("cuda")
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
        json_file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    console.print(verdict(checks))
    if broken := [c for c in checks if c.verdict in ("broken", "untrained?")]:
        raise UserError(f"doctor {teacher!r}: {broken[0].remedy}")


@app.command()
def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="The card to run on.")] = "rtx-4090",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here.")] = None,
):
    """Say what a recipe's run would take: memory by part, time, cost; exit 2 if it will not fit."""
    import json

    from distill.plan import GPUS, RESERVE, advice
    from distill.recipe import Recipe
    from distill.terminal import out as console
    from distill.terminal import planned, waiting
    from teachers.errors import UserError, nearest

    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r}: {nearest(gpu, GPUS)}")
    if json_file is not None:
        writable(json_file, "--json")
    checked = Recipe.load(recipe, overrides or [])
    card = GPUS[gpu]
    with waiting("distill: playing a step on shapes alone"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fake tensors, which have no addresses
        from distill import forecast

        made = forecast.plan(checked)
    tree = made.tree(gpu, card)
    console.print(planned(tree, card.memory, RESERVE))
    if json_file is not None:
        json_file.write_text(json.dumps(tree, indent=2) + "\n")
    if remedies := advice(checked, made, card):
        raise UserError(
            f"plan: {made.peak + RESERVE:.1f} GB do not fit on {gpu} ({card.memory:g} GB); "
            + "; ".join(remedies)
        )


@app.command()
def bench(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped one: bench/digits.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Such as seeds=[0] budget.network_evaluations=20000.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Its folder.", show_default="runs/bench-RECIPE")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
):
    """Race objectives at one budget: every row and seed a run, then a leaderboard and plots.

    Called again, it goes on where it was: what is finished is kept, and what failed too, until its
    row changes. OUT gets leaderboard.json, leaderboard.md and plots; OUT/runs, every run.
    """
    from distill.terminal import out as console
    from distill.terminal import waiting

    out = out or Path("runs") / f"bench-{Path(recipe).stem}"
    with waiting("distill: preparing"):
        from distill import race
    lines = race.bench(recipe, overrides or [], out, jobs)
    failed = {v.name for v in lines if v.failed}
    console.print(race.standings(lines))
    note = f"; failed: {', '.join(sorted(failed))}" if failed else ""
    console.print(f"leaderboard and plots in {out}{note}", soft_wrap=True, markup=False)


@app.command()
def cache(recipe: RecipeArg, overrides: Overrides = None):
    """Encode a recipe's prompts and images once, into a cache that its runs read."""
    from distill.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    from distill.build import make_cache
    from distill.terminal import say

    report = make_cache(checked)
    kinds = ", ".join(f"{n} {kind}" for kind, n in report["by_kind"].items())
    skipped = f"; {report['skipped']} skipped ({kinds}), see data-report.json" if kinds else ""
    say(f"{report['items'] - report['skipped']:,} items cached{skipped}")


@app.command(name="list")
def listing(
    what: Annotated[
        str | None,
        typer.Argument(help="objectives, recipes, teachers, metrics or protocols; all by default."),
    ] = None,
):
    """Name what there is: objectives, recipes, teachers, metrics and protocols."""
    from distill.catalogue import KINDS as kinds
    from distill.terminal import out as console
    from teachers.errors import UserError, nearest

    if what is not None and what not in kinds:
        raise UserError(f"list {what!r} is unknown: {nearest(what, kinds)}")
    from rich.table import Table

    for kind in [what] if what else kinds:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, line in kinds[kind]().items():
            table.add_row(name if what else f"  {name}", line)
        if not what:
            console.print(kind, style="bold")
        console.print(table)


class Terminated(BaseException):
    """SIGTERM came outside of training, where there is no step to finish."""


AGAIN = "stopped; a run goes on with --resume, a benchmark when it is called again"


def interrupt(number: int, frame: Any) -> None:
    raise Terminated


def main() -> None:
    """Exit codes: 0 done; 2 the user's mistake, in one line; 130/143 stopped; 1 anything else."""
    code = 1
    signal.signal(signal.SIGTERM, interrupt)
    if not sys.warnoptions:  # what our dependencies will change is no user's concern
        warnings.simplefilter("ignore", FutureWarning)
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(
            "distill: SIGINT: stopped; a run goes on with --resume, a benchmark by itself\n"
        )
        code = 128 + signal.SIGINT
    except Terminated:
        sys.stderr.write(
            "distill: SIGTERM: stopped; a run goes on with --resume, a benchmark by itself\n"
        )
        code = 128 + signal.SIGTERM
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
    finally:
        leave_group()
    sys.exit(code)


def code_of(error: Exception) -> int | None:
    """The exit code of an error that is not our own fault, having said it in one line."""
    from distill.mistakes import is_usage, said, stop_code

    if (stopped := stop_code(error)) is not None:
        return stopped
    line = is_usage(error) or said(error)
    if line is None:
        return None
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"distill: {' '.join(line.split())}\n")
    return 2


def leave_group() -> None:
    """An open process group at exit now and then aborts a rank."""
    if (torch := sys.modules.get("torch")) is not None:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
