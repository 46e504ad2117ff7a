"""`distill sample`, `eval`, `draw`, `reference`: images and metrics of students and teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.options import Student, check_writable, expand_home, step_counts
from distill.cli.pictures import with_pictures

MAX_IMAGES = 100_000  # of one `distill sample`, which holds all of them in memory
MAX_SEEDS = 1000  # of one `distill eval`, which generates a whole set of samples for each
MAX_STEPS = 10_000


def sample(
    student: Student,
    out: Annotated[
        Path,
        typer.Option(
            callback=expand_home,
            help="A .png file for a grid, or .npz for arrays of images and labels.",
        ),
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            help="One of the student's step counts.", show_default="the best one measured"
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", help="How many images to generate.", min=1, max=MAX_IMAGES)
    ] = 16,
    seed: Annotated[int, typer.Option(help="The seed of the pipeline's generator.")] = 0,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes, such as 3 or 0,1,2; repeated in turn up to --n images."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; give the option again for several, at most --n."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture to edit or to paint in; give one, or one for each prompt."),
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="A mask for each --image to paint in, white where it is painted anew."),
    ] = None,
):
    """Generate images with a student.

    They are the images that the student's diffusers pipeline generates for the same seed.
    """
    from distill.console import spinner
    from distill.data.encode import counting, print_cuts
    from students.export.folder import load_student, sample_student
    from teachers.errors import UserError

    check_out_and_seed(out, seed)
    generator, teacher = load_student(student)
    steps = best_count(student, generator.counts) if steps is None else steps
    if steps not in generator.counts:
        raise UserError(f"--steps {steps}: this student was trained for {step_counts(generator)}")
    distinct, is_text = distinct_prompts(teacher, labels, prompt, n)
    distinct = with_pictures(teacher, distinct, image or [], mask or [])
    prompts = [distinct[i % len(distinct)] for i in range(n)]
    with counting(teacher) as cuts:
        teacher.codec.condition(list(dict.fromkeys(prompts)))
    print_cuts(cuts, "--prompt")
    with spinner(f"generating {n} images in {steps} step{'s' * (steps != 1)}"):
        images = teacher.codec.decode(sample_student(generator.at(steps), teacher, prompts, seed))
    labels_of = str if is_text else int
    save_images(images, out, [labels_of(p) for p in prompts], len(distinct))


def check_out_and_seed(out: Path, seed: int) -> None:
    """Refuse a file that cannot be written, and a seed that generators do not take.

    Raises:
        UserError: naming the option.
    """
    from teachers.errors import UserError, cut

    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {cut(str(out))}: expected a name that ends in .png or .npz")
    check_writable(out, "--out")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")


def best_count(student: Path, counts: tuple[int, ...]) -> int:
    """The step count that a student's measurements advise; the largest if it has none."""
    from distill.publish.results_table import advised
    from distill.report.page import intact, read_summary

    summary = student / "summary.json"
    with intact(summary):
        return advised(counts, read_summary(student) if summary.is_file() else {})


def distinct_prompts(
    teacher: Any, labels: str | None, prompts: list[str] | None, n: int
) -> tuple[list[str], bool]:
    """The prompts or labels that n images are generated for in turn, and whether they are text.

    Raises:
        UserError: an option does not suit the student, or there are more than n of them.
    """
    from teachers.errors import UserError

    classes = teacher.codec.classes
    is_text = not classes and teacher.codec.condition([""]) is not None
    check_conditions(labels, prompts, bool(classes), is_text)
    if labels is not None:
        option, names = "--labels", split_labels(labels)
    elif prompts:
        option, names = "--prompt", prompts
    else:
        return [str(i) for i in range(classes or 1)], is_text
    if len(names) > n:
        raise UserError(f"{option}: there are {len(names)} and --n is {n}; give --n {len(names)}")
    return names, is_text


def check_conditions(
    labels: str | None, prompts: list[str] | None, has_classes: bool, is_text: bool
) -> None:
    """Refuse labels or prompts for a student that is not conditioned on them.

    Raises:
        UserError: an option does not suit the student, or prompts are missing.
    """
    from teachers.errors import UserError

    if labels is not None and not has_classes:
        raise UserError("--labels: this student is not class-conditional; leave the option out")
    if is_text and not prompts:
        raise UserError('--prompt: missing; this student is text-conditional: add --prompt "…"')
    if prompts and not is_text:
        raise UserError("--prompt: this student is not text-conditional; leave the option out")


def save_images(images: Any, out: Path, labels: list[Any], distinct: int) -> None:
    """Write images (N, C, H, W) with their labels to an .npz file, or as a .png grid, and say so.

    Args:
        distinct: How many different labels follow in turn; the grid has a column for each.
    """
    from distill.console import print_line

    if out.suffix == ".npz":
        import numpy as np

        from eval.samples import to_uint8

        np.savez(out, images=to_uint8(images).numpy(), labels=np.array(labels))
    else:
        from distill.grids import save_grid

        columns = distinct * max(1, 8 // distinct) if distinct <= 16 else 8
        save_grid(images, out, min(len(images), columns))
    print_line(f"wrote {out}")


def split_labels(labels: str) -> list[str]:
    """The labels in `--labels`; the codec checks later that they are classes.

    Raises:
        UserError: one is empty.
    """
    from teachers.errors import UserError, quoted

    names = [p.strip() for p in labels.split(",")]
    if "" in names:
        empty = f"label {names.index('') + 1} of {len(names)} is empty"
        raise UserError(f"--labels {quoted(labels)}: {empty}; give numbers, such as 3 or 0,1,2")
    return names


Source = Annotated[
    str,
    typer.Argument(help="A student (its folder or its run's), or a teacher as recipes name it."),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="The evaluation protocol; see `distill list protocols`.", show_default="the run's own"
    ),
]
Steps = Annotated[
    str,
    typer.Option(
        help="Step counts, such as 1,2,4; default: all of a student's, 1,2,4 of a teacher."
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_SEEDS, help="How many seeds, counted from 0.", show_default="the protocol's"
    ),
]
Against = Annotated[str | None, typer.Option(help="A teacher to measure too, from the same noise.")]
AgainstSteps = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_STEPS, help="The teacher's step count.", show_default="18"),
]
Solver = Annotated[
    str, typer.Option(help="Of a teacher: one of our solvers, or a diffusers scheduler class.")
]
Guidance = Annotated[
    float, typer.Option(help="Of a teacher: the guidance scale g = 1 + w; 1 is unguided.")
]
NullLabel = Annotated[int | None, typer.Option(help="Of a teacher: the class that means no class.")]
Schedule = Annotated[
    str, typer.Option(help="Timesteps of our solvers: own, ays, gits, searched or truncated.")
]
Adaptive = Annotated[
    float | None,
    typer.Option(
        help="Stop guidance once both predictions have this cosine similarity, such as 0.991."
    ),
]
DeepCache = Annotated[
    int,
    typer.Option(
        min=1, help="DeepCache: compute the whole UNet only once in this many evaluations."
    ),
]
Inherit = Annotated[
    list[str] | None,
    typer.Option(help="With --cache: a layer that is kept, by name, not all inner levels."),
]
Precision = Annotated[
    str | None, typer.Option(help="Weights of text-to-image models in fp32, bf16 or fp16.")
]
Speed = Annotated[
    bool, typer.Option("--speed", help="Measure speed; quality too if --protocol is given.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=expand_home,
        help="Write the results to this JSON file; seeds already in it are not measured again.",
    ),
]


def evaluate(
    source: Source,
    protocol: Protocol = None,
    steps: Steps = "",
    seeds: Seeds = None,
    against: Against = None,
    against_steps: AgainstSteps = None,
    solver: Solver = "heun",
    guidance: Guidance = 1.0,
    null_label: NullLabel = None,
    schedule: Schedule = "own",
    adaptive: Adaptive = None,
    cache: DeepCache = 1,
    inherit: Inherit = None,
    precision: Precision = None,
    speed: Speed = False,
    json_file: JsonFile = None,
):
    """Measure a student or a teacher by an evaluation protocol, or measure its speed."""
    from distill.evaluation.evaluate import Request
    from distill.evaluation.evaluate import evaluate as measure

    if json_file is not None:
        check_writable(json_file, "--json")
    sampler = {"solver": solver, "guidance": guidance, "null_label": null_label}
    few_step = {"schedule": schedule, "adaptive": adaptive, "cache": cache}
    if inherit:  # files of results from before this option stay valid without it
        few_step["inherit"] = inherit
    beside = {"against": against, "against_steps": against_steps}
    weights = {"precision": precision, "speed": speed, "json_file": json_file}
    measure(
        Request(
            source, protocol, steps, seeds, sampler=sampler, few_step=few_step, **beside, **weights
        )
    )


Prompts = Annotated[
    Path,
    typer.Argument(
        callback=expand_home,
        help="GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files.",
    ),
]
ImageFolder = Annotated[
    Path,
    typer.Argument(
        callback=expand_home,
        help="Where to write the images for the scorer; FOLDER.json describes them.",
    ),
]
DrawSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_STEPS,
        help="The step count.",
        show_default="a student's largest; 18 of a teacher",
    ),
]


def draw(
    benchmark: Annotated[str, typer.Argument(help="geneval or dpg.")],
    source: Source,
    prompts: Prompts,
    folder: ImageFolder,
    steps: DrawSteps = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="The seed of the noise.")] = 0,
    solver: Solver = "heun",
    guidance: Guidance = 1.0,
):
    """Generate four images for each prompt of a benchmark, in the layout its scorer reads.

    The same command continues where a stopped one ended.
    """
    from accelerate import PartialState

    from distill.console import print_line
    from distill.data.encode import device as device_of
    from distill.evaluation import prompt_benchmarks as benchmarks
    from distill.evaluation import subject
    from eval.stream import Processes

    entries = benchmarks.prompts_of(benchmark, prompts)
    device = device_of()
    # without `cpu`, processes on CPUs do not find each other
    state = PartialState(cpu=device.type == "cpu")
    if subject.is_student(source):
        loaded = subject.student(source, device)
    else:
        loaded = subject.teacher(source, device, solver, guidance)
    k = steps or max(loaded.counts or (18,))
    loaded.check([k])
    benchmarks.check_subject(loaded, benchmark)
    lines = [v._asdict() for v in entries]
    contents = {"benchmark": benchmark, "steps": k, "seed": seed}
    contents |= {**loaded.identity, "prompts": lines}
    record = benchmarks.check_folder(folder, contents)
    check_writable(record, "draw")
    state.wait_for_everyone()  # every process checks the folder before one writes to it
    if state.is_main_process:
        benchmarks.write_record(record, contents)
    processes = Processes(state.process_index, state.num_processes)
    benchmarks.sample_prompts(loaded, benchmark, entries, folder, k, seed, processes)
    print_line(f"images of {len(entries):,} prompts in {folder}")


def reference(
    name: Annotated[
        str, typer.Argument(help="The reference's name in a protocol, such as coco2017-val.")
    ],
    source: Annotated[
        Path,
        typer.Argument(
            callback=expand_home,
            help="A folder of the reference images, or their published moments (FILE.npz).",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(help="Only for this protocol.", show_default="all that use the reference"),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="With moments: the network whose features they are of."),
    ] = None,
):
    """Compute the statistics of real images that evaluation protocols compare samples with.

    Statistics that already exist are kept.
    """
    from distill.console import print_line
    from distill.evaluation import references
    from teachers.errors import UserError

    request = references.request_for(name, protocol)
    if source.is_dir():
        if features is not None:
            raise UserError(
                "--features: only for an .npz file; a folder of images gives all features"
            )
        files = references.from_images(request, source)
        where = files[0].parent
        print_line(f"{name}: {request.count:,} images, {len(files)} kinds of features in {where}")
        return
    if source.suffix != ".npz" or not source.is_file():
        raise UserError(
            f"{source}: neither a folder nor an .npz file; give a folder of images, or an .npz "
            "file with mu and sigma"
        )
    path, missing = references.from_moments(request, source, features)
    print_line(f"{name}: moments in {path}; taken to be of its {request.count:,} images, unchecked")
    if missing:
        names = ", ".join(need.features.name for need in missing)
        print_line(f"still missing: {names}; compute them from the folder of images")
