"""`distill draw`: samples the prompts of a benchmark for its authors' scorer, which runs elsewhere.

Each prompt's images depend only on its index and the seed, so a call that was cut off resumes, and
several processes share the prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from distill.console import with_bar
from distill.data.encode import picture_shape
from distill.evaluation.subject import Subject
from distill.files import write
from distill.sampling.student_sampler import conditioning
from eval.prompt_benchmarks import BENCHMARKS, IMAGES_PER_PROMPT, BenchmarkPrompt
from eval.stream import ONE_PROCESS, Processes
from teachers.errors import UserError, nearest


def prompts_of(benchmark: str, path: Path) -> list[BenchmarkPrompt]:
    """The benchmark's prompts, from the file or folder that its authors publish.

    Raises:
        UserError: there is no such benchmark, or no prompt.
        MetricError: the file or folder is not the benchmark's.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark {benchmark!r}: unknown; {nearest(benchmark, BENCHMARKS)}")
    path.exists()  # raises for a name that is too long; the reader would repeat it in full
    if not (prompts := BENCHMARKS[benchmark].read(path)):
        raise UserError(f"{benchmark}: no prompts in {path}; give the file or folder that has them")
    return prompts


def check_subject(subject: Subject, benchmark: str) -> None:
    """Refuse a subject that cannot sample a benchmark's prompts.

    Raises:
        UserError: it is not text-conditional, or its images are not in colour.
    """
    if (kind := conditioning(subject.teacher)) != "captions":
        raise UserError(
            f"{benchmark}: it needs a text-conditional model, and this one takes {kind}; "
            "give another source"
        )
    shape = picture_shape(subject.teacher)
    if len(shape) != 3 or shape[0] != 3:
        size = "×".join(map(str, shape))
        raise UserError(
            f"{benchmark}: it needs images in colour, and these are {size}; give another source"
        )


def check_folder(folder: Path, contents: dict[str, object]) -> Path:
    """The record beside a folder: a JSON file that says what the folder holds.

    The folder must be new, or hold images of the same contents.

    Raises:
        UserError: the folder holds other files, or is a file, or the record is another's.
    """
    if folder.name in ("", ".."):  # as "." and "/" have none
        raise UserError(f"{folder}: it has no name for a .json beside it; give a new folder")
    record = folder.with_name(f"{folder.name}.json")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: it is a file; give a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{folder}: the folder {folder.parent} does not exist; make it first")
    filled = folder.is_dir() and any(folder.iterdir())
    if (filled or record.exists()) and not matches(record, contents):
        raise UserError(
            f"{folder}: it is not empty, and {record.name} does not describe these images; "
            "give a new folder"
            if filled
            else f"{record}: it exists and does not describe these images; give a new folder"
        )
    return record


def matches(record: Path, contents: dict[str, object]) -> bool:
    """Whether a file exists and holds exactly these contents."""
    try:
        return json.loads(record.read_text(encoding="utf-8")) == json.loads(json.dumps(contents))
    except (OSError, ValueError, RecursionError):
        return False


def sample_prompts(
    subject: Subject,
    benchmark: str,
    prompts: list[BenchmarkPrompt],
    folder: Path,
    steps: int,
    seed: int = 0,
    processes: Processes = ONE_PROCESS,
) -> None:
    """Sample and write the images of all prompts whose images are missing."""
    layout = BENCHMARKS[benchmark]
    sampler = subject.sampler([v.prompt for v in prompts], steps, None)
    missing = [
        (i, v)
        for i, v in enumerate(prompts)
        if i % processes.count == processes.rank and not layout.last_file(v, folder).exists()
    ]
    task = f"{IMAGES_PER_PROMPT} images of each of {len(missing)} prompts"
    for i, v in with_bar(missing, len(missing), task):
        samples = sampler([v.prompt] * IMAGES_PER_PROMPT, seed * len(prompts) + i)
        layout.write(v, samples.images, folder)


def write_record(record: Path, contents: dict[str, object]) -> None:
    """Write the record of a folder, before its first image."""
    write(record, json.dumps(contents, indent=2) + "\n")
