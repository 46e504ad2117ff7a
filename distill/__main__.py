"""The command line: `distill run | cache | sample | eval | teach | list`."""

from __future__ import annotations

import os
import signal
import sys
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
Student = Annotated[Path, typer.Argument(help="A run's folder, or the student folder in it.")]


@app.command()
def run(recipe: RecipeArg, overrides: Overrides = None, out: Out = None, resume: Resume = False):
    """Distil: train the student of a recipe, export it, and measure it against its teacher."""
    from distill.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    out = out or Path("runs") / Path(recipe).stem
    from distill import build
    from distill.terminal import out as console

    if finished(out) and resume and not more_steps(out, checked.train.steps):
        build.check_folder(checked, out, resume)
        console.print(f"{out} is finished; its figures:")
        return show(out)
    made = build.build(checked, out, resume)
    main = made.engine.accelerator.is_main_process
    if main:
        guidance = checked.teacher.guidance
        console.print(
            f"{checked.objective['name']}: {checked.teacher.source} (guidance g = {guidance:g}, "
            f"{'none' if guidance == 1 else 'w = g - 1'}) to {made.student.counts} steps, in {out}",
            soft_wrap=True,
        )
    made.engine.train()
    if main and made.protocol:
        console.print("exporting and measuring")
    build.finish(made)
    if main:
        show(out)


def finished(out: Path) -> bool:
    """Whether the run in `out` came to its end."""
    import json

    try:
        summary = json.loads((out / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    whole = isinstance(summary, dict) and {"steps", "wall_s", "metrics"} <= summary.keys()
    return whole and (out / "student").is_dir()


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
        full = metrics["teacher"]
        rows = {f"teacher, {full['steps']}-step {full['solver']}": full}
        rows |= {
            f"teacher, {k} step{'s' * (k != '1')}": v for k, v in metrics["teacher_few"].items()
        }
        rows |= {f"student, {k} step{'s' * (k != '1')}": v for k, v in metrics["student"].items()}
        console.print(results(f"{full['protocol']}: {full['n']} samples; ± over seeds", rows))
    else:
        console.print("not measured: the recipe names no eval.protocol")
    console.print(
        f"{summary['steps']} steps in {summary['wall_s']:.0f} s, "
        f"{summary['network_evaluations']:,} network evaluations; student in {out / 'student'}",
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
):
    """Draw pictures from a student: those that the stock pipeline draws for the same seed."""
    from students.export import draw, load_student
    from teachers.errors import UserError

    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: expected a name that ends in .png or .npz")
    writable(out, "--out")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")
    generator, teacher = load_student(student)
    if steps not in generator.counts:
        raise UserError(f"--steps {steps}: this student was trained for {counts(generator)} steps")
    classes = getattr(teacher.codec, "classes", 0)
    if labels is not None and not classes:
        raise UserError("--labels: this student is not class-conditional")
    names = (
        [p.strip() for p in labels.split(",")] if labels else [str(i) for i in range(classes or 1)]
    )
    wanted = [names[i % len(names)] for i in range(n)]
    teacher.codec.condition(wanted)
    images = teacher.codec.decode(draw(generator.at(steps), teacher, wanted, seed))
    if out.suffix == ".npz":
        import numpy as np

        from eval.samples import to_uint8

        np.savez(out, images=to_uint8(images).numpy(), labels=np.array([int(p) for p in wanted]))
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
    *most, last = map(str, generator.counts)
    return f"{', '.join(most)} or {last}" if most else last


@app.command(name="eval")
def evaluate(
    student: Student,
    protocol: Annotated[str, typer.Option(help="How to measure: digits.")] = "digits",
    steps: Annotated[str, typer.Option(help="Step counts, such as 1,2,4; all by default.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
):
    """Measure a student by a protocol, at the step counts given."""
    import json

    from distill.build import check_protocol, student_samples
    from distill.terminal import out as console
    from distill.terminal import results
    from eval.protocol import protocol as protocol_of
    from students.export import load_student
    from teachers.errors import UserError

    measure = protocol_of(protocol)
    if json_file is not None:
        writable(json_file, "--json")
    generator, teacher = load_student(student)
    check_protocol(measure, teacher)
    wanted = steps.split(",") if steps else [str(k) for k in generator.counts]
    for k in wanted:
        if not k.strip().isdecimal() or int(k) not in generator.counts:
            raise UserError(f"--steps {k}: this student was trained for {counts(generator)} steps")
    found = {}
    for k in map(int, wanted):
        few = generator.at(k)
        found[str(k)] = measure(lambda p, seed: student_samples(few, teacher, p, seed), seeds)  # noqa: B023
    rows = {f"{k} step{'s' * (k != '1')}": v for k, v in found.items()}
    title = f"{protocol}: {len(measure.prompts)} samples; ± over seeds"
    console.print(results(title, rows))
    if json_file is not None:
        json_file.write_text(json.dumps({"protocol": protocol, "student": found}, indent=2) + "\n")


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
        console.print(results("teacher", rows))
    console.print(f"teacher in {out / 'teacher'}")


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
def listing(what: Annotated[str, typer.Argument(help="objectives, recipes, teachers or metrics.")]):
    """Name what there is: objectives, recipes, teachers or metrics."""
    from distill.terminal import out as console
    from teachers.errors import UserError, nearest

    kinds = {"objectives": objectives, "recipes": recipes, "teachers": teachers, "metrics": metrics}
    if what not in kinds:
        raise UserError(f"list {what!r} is unknown: {nearest(what, kinds)}")
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, line in kinds[what]().items():
        table.add_row(name, line)
    console.print(table)


def objectives() -> dict[str, str]:
    from distill.objectives import OBJECTIVES

    docs = {k: sys.modules[v.__module__].__doc__ or "" for k, v in OBJECTIVES.items()}
    return {k: v.strip().splitlines()[0] for k, v in docs.items()}


def recipes() -> dict[str, str]:
    from distill.recipe import SHIPPED, shipped

    lines = {k: (SHIPPED / f"{k}.yaml").read_text().splitlines()[0] for k in shipped()}
    return {k: v.lstrip("# ") for k, v in lines.items()}


def teachers() -> dict[str, str]:
    from teachers.analytic import ANALYTIC
    from teachers.unet import PIPELINES

    found = {"digits": "embedded: class-conditional, 8×8 handwritten digits"}
    found |= {f"analytic:{k}": "closed form, for tests and study" for k in ANALYTIC}
    return found | dict.fromkeys(PIPELINES, "a diffusers folder or Hub id of this pipeline")


def metrics() -> dict[str, str]:
    from eval.protocol import METRICS

    return METRICS


class Terminated(BaseException):
    """SIGTERM came outside of training, where there is no step to finish."""


def interrupt(number: int, frame: Any) -> None:
    raise Terminated


def main() -> None:
    """Exit codes: 0 done; 2 the user's mistake, in one line; 130/143 stopped; 1 anything else."""
    code = 1
    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("distill: SIGINT: stopped; a run goes on with --resume\n")
        code = 128 + signal.SIGINT
    except Terminated:
        sys.stderr.write("distill: SIGTERM: stopped; a run goes on with --resume\n")
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
