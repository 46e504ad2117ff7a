"""`distill sample`, `eval`, `draw`, `reference`: pictures and figures of students and teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import Student, at_home, counts, writable

MOST = 100_000  # pictures that `sample` draws: all are in memory at once


def sample(
    student: Student,
    out: Annotated[
        Path, typer.Option(callback=at_home, help="A .png grid, or .npz with images and labels.")
    ],
    steps: Annotated[
        int | None, typer.Option(help="A count it was trained for; by default its run's best.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="How many pictures.", min=1, max=MOST)] = 16,
    seed: Annotated[int, typer.Option(help="The stock pipeline's generator seed.")] = 0,
    labels: Annotated[str | None, typer.Option(help="Such as 3, or 0,1,2: repeated to n.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For text students; may be repeated, and is up to n.")
    ] = None,
):
    """Draw pictures from a student: those that the stock pipeline draws for the same seed."""
    from distill.console import waiting
    from distill.data.encode import counting, tell
    from distill.publish.results_table import advised
    from distill.report.page import intact, read_summary
    from students.export.folder import draw, load_student
    from teachers.errors import UserError, cut
    from teachers.text import plural

    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {cut(str(out))}: expected a name that ends in .png or .npz")
    writable(out, "--out")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")
    generator, teacher = load_student(student)
    if steps is None:
        done = student / "summary.json"
        with intact(done):
            steps = advised(generator.counts, read_summary(student) if done.is_file() else {})
    if steps not in generator.counts:
        raise UserError(f"--steps {steps}: this student was trained for {counts(generator)}")
    names, text = prompts_of(teacher, labels, prompt, n)
    wanted = [names[i % len(names)] for i in range(n)]
    with counting(teacher) as cuts:
        teacher.codec.condition(list(dict.fromkeys(wanted)))
    tell(cuts, "--prompt")
    with waiting(f"drawing {n} pictures in {steps} {plural(steps, 'step')}"):
        images = teacher.codec.decode(draw(generator.at(steps), teacher, wanted, seed))
    save_pictures(images, out, wanted if text else [int(p) for p in wanted], len(names))


def prompts_of(
    teacher: Any, labels: str | None, prompt: list[str] | None, n: int
) -> tuple[list[str], bool]:
    """The prompts or labels to draw n pictures of in turn, and whether they are text.

    Raises:
        UserError: an option does not go with the student, or there are more of them than n.
    """
    from teachers.errors import UserError

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
    names = prompt or [str(i) for i in range(classes or 1)]
    if labels is not None:
        names = split_labels(labels)
    if (labels or prompt) and len(names) > n:
        option = "--labels" if labels else "--prompt"
        raise UserError(f"{option}: there are {len(names)} and --n is {n}; give --n {len(names)}")
    return names, text


def save_pictures(images: Any, out: Path, labels: list[Any], kinds: int) -> None:
    """Pictures (N, C, H, W) with their labels in an .npz, or as a .png grid.

    Args:
        kinds: How many different labels come in turn; the grid has a column for each.
    """
    if out.suffix == ".npz":
        import numpy as np

        from eval.samples import to_uint8

        np.savez(out, images=to_uint8(images).numpy(), labels=np.array(labels))
        return
    from distill.grids import save_grid

    columns = kinds * max(1, 8 // kinds) if kinds <= 16 else 8
    save_grid(images, out, min(len(images), columns))


def split_labels(labels: str) -> list[str]:
    """The labels of `--labels`, which are checked as they are drawn.

    Raises:
        UserError: one is empty.
    """
    from teachers.errors import UserError, quoted

    names = [p.strip() for p in labels.split(",")]
    if "" in names:
        which = f"label {names.index('') + 1} of {len(names)} is empty"
        raise UserError(f"--labels {quoted(labels)}: {which}; give numbers, such as 3 or 0,1,2")
    return names


Source = Annotated[str, typer.Argument(help="A student or its run's folder, or a teacher.")]
Solver = Annotated[
    str, typer.Option(help="Teachers': one of ours, or a scheduler class of diffusers.")
]
Guidance = Annotated[float, typer.Option(help="Teachers': g = 1 + w; 1 is none.")]


def evaluate(
    source: Source,
    protocol: Annotated[
        str | None,
        typer.Option(help="How to measure; see distill list.", show_default="the run's own"),
    ] = None,
    steps: Annotated[str, typer.Option(help="Such as 1,2,4; all of a student's, by default.")] = "",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many, from 0; the protocol's by default.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A teacher to measure beside it, from the same noise.")
    ] = None,
    against_steps: Annotated[
        int | None, typer.Option(min=1, help="And in how many steps.", show_default="18")
    ] = None,
    solver: Solver = "heun",
    guidance: Guidance = 1.0,
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
    precision: Annotated[
        str | None, typer.Option(help="Of the weights: fp32, bf16 or fp16; text pipelines only.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time it: alone, unless a protocol is named.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", callback=at_home, help="Write the figures here; seeds that it holds are kept."
        ),
    ] = None,
):
    """Measure a student or a teacher by a protocol, at the step counts given; or its speed."""
    from distill.evaluation.evaluate import Request
    from distill.evaluation.evaluate import evaluate as measure

    if json_file is not None:
        writable(json_file, "--json")
    how = {"solver": solver, "guidance": guidance, "null_label": null_label}
    few = {"schedule": schedule, "adaptive": adaptive, "cache": cache}
    beside = {"against": against, "against_steps": against_steps}
    weights = {"precision": precision, "speed": speed, "json_file": json_file}
    measure(Request(source, protocol, steps, seeds, how=how, few=few, **beside, **weights))


def draw(
    benchmark: Annotated[str, typer.Argument(help="geneval or dpg.")],
    source: Source,
    prompts: Annotated[
        Path,
        typer.Argument(
            callback=at_home, help="GenEval's evaluation_metadata.jsonl; DPG-Bench's folder of .txt"
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(callback=at_home, help="For its scorer; FOLDER.json says what it holds."),
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="A student's most, or a teacher's 18, by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Other pictures for another.")] = 0,
    solver: Solver = "heun",
    guidance: Guidance = 1.0,
):
    """Draw a benchmark's prompts, four pictures of each, as the scorer of its authors takes them.

    Called again, it goes on where it was cut off.
    """
    from accelerate import PartialState

    from distill.console import say
    from distill.data.encode import device as device_of
    from distill.evaluation import prompt_benchmarks as benchmarks
    from distill.evaluation import subject
    from eval.stream import Processes

    asked = benchmarks.prompts_of(benchmark, prompts)
    device = device_of()
    state = PartialState(
        cpu=device.type == "cpu"
    )  # or processes on CPUs do not know of one another
    if subject.is_student(source):
        found = subject.student(source, device)
    else:
        found = subject.teacher(source, device, solver, guidance)
    k = steps or max(found.counts or (18,))
    found.check([k])
    benchmarks.check_subject(found, benchmark)
    lines = [v._asdict() for v in asked]
    about = {"benchmark": benchmark, "steps": k, "seed": seed, **found.about, "prompts": lines}
    record = benchmarks.check_folder(folder, about)
    writable(record, "draw")
    state.wait_for_everyone()  # all have looked before anything is there
    if state.is_main_process:
        benchmarks.begin(record, about)
    processes = Processes(state.process_index, state.num_processes)
    benchmarks.draw(found, benchmark, asked, folder, k, seed, processes)
    say(f"pictures of {len(asked):,} prompts in {folder}")


def reference(
    name: Annotated[str, typer.Argument(help="Of the set of pictures, as protocols name it.")],
    source: Annotated[
        Path,
        typer.Argument(
            callback=at_home, help="Its folder of pictures; or published moments, FILE.npz."
        ),
    ],
    protocol: Annotated[
        str | None, typer.Option(help="For this one alone; for all that take it, by default.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Which features the moments are of, if it may be several.")
    ] = None,
):
    """Make the statistics of real pictures that protocols compare with; what is there is kept."""
    from distill.console import say
    from distill.evaluation import references
    from teachers.errors import UserError

    asked = references.wanted(name, protocol)
    if source.is_dir():
        if features is not None:
            raise UserError("--features: for an .npz alone; of pictures all are made")
        made = references.from_pictures(asked, source)
        say(f"{name}: {asked.count:,} pictures, {len(made)} kinds of features in {made[0].parent}")
        return
    if source.suffix != ".npz" or not source.is_file():
        raise UserError(f"{source}: expected a folder of pictures, or an .npz of mu and sigma")
    path, rest = references.from_moments(asked, source, features)
    say(f"{name}: moments in {path}; that they are of {asked.count:,} pictures is your word")
    if rest:
        names = ", ".join(need.features.name for need in rest)
        say(f"still to be made, of the pictures: {names}")
