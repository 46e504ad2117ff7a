"""`distill draw`: a benchmark's prompts drawn for the scorer of its authors, which runs elsewhere.

The pictures of a prompt hang on the prompt's place and the seed alone, so a call that was cut off
goes on, and several processes share the prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from distill.console import with_bar
from distill.data.encode import picture_shape
from distill.evaluation.subject import Subject
from distill.files import write
from distill.sampling.student_sampler import asked_by
from eval.prompt_benchmarks import BENCHMARKS, EACH, BenchmarkPrompt
from eval.stream import ALONE, Processes
from teachers.errors import UserError, nearest


def prompts_of(benchmark: str, path: Path) -> list[BenchmarkPrompt]:
    """The benchmark's prompts, from where its authors' are.

    Raises:
        UserError: there is no such benchmark, or no prompt.
        MetricError: the file or folder is not the benchmark's.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark {benchmark!r}: unknown; {nearest(benchmark, BENCHMARKS)}")
    path.exists()  # raises where the name is too long for a file's, which the reader repeats whole
    if not (found := BENCHMARKS[benchmark].read(path)):
        raise UserError(f"{benchmark}: no prompts in {path}")
    return found


def check_subject(found: Subject, benchmark: str) -> None:
    """Refuse what cannot draw a benchmark's pictures.

    Raises:
        UserError: it reads no captions, or its pictures have not three channels and two sides.
    """
    if (kind := asked_by(found.teacher)) != "captions":
        raise UserError(f"{benchmark}: it asks by captions, this model takes {kind}; give another")
    shape = picture_shape(found.teacher)
    if len(shape) != 3 or shape[0] != 3:
        raise UserError(f"{benchmark}: expected pictures in colour, not {shape}")


def check_folder(folder: Path, about: dict[str, object]) -> Path:
    """The file beside a folder that says what is in it, which must be new or of the same pictures.

    Raises:
        UserError: other pictures are in the folder, or other files, or it is none; or the file that
            would say so is another's.
    """
    if folder.name in ("", ".."):  # as "." and "/" have none
        raise UserError(f"{folder}: it has no name for a .json beside it; give a new folder")
    record = folder.with_name(f"{folder.name}.json")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: it is a file; give a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{folder}: the folder {folder.parent} does not exist")
    filled = folder.is_dir() and any(folder.iterdir())
    if (filled or record.exists()) and not says(record, about):
        raise UserError(
            f"{folder}: it is not empty, and holds no such pictures ({record.name} says what); "
            "give a new folder"
            if filled
            else f"{record}: it is no record of these pictures; give a new folder"
        )
    return record


def says(record: Path, about: dict[str, object]) -> bool:
    """Whether a file is there and says just this."""
    try:
        return json.loads(record.read_text(encoding="utf-8")) == json.loads(json.dumps(about))
    except (OSError, ValueError, RecursionError):
        return False


def draw(
    found: Subject,
    benchmark: str,
    asked: list[BenchmarkPrompt],
    folder: Path,
    steps: int,
    seed: int = 0,
    processes: Processes = ALONE,
) -> None:
    """Lay down the pictures of all prompts that are not there yet."""
    layout = BENCHMARKS[benchmark]
    some = found.draw([v.prompt for v in asked], steps, None)
    mine = [
        (number, v)
        for number, v in enumerate(asked)
        if number % processes.count == processes.rank and not layout.place(v, folder).exists()
    ]
    for number, v in with_bar(mine, len(mine), f"{EACH} pictures of each of {len(mine)} prompts"):
        samples = some([v.prompt] * EACH, seed * len(asked) + number)
        layout.write(v, samples.images, folder)


def begin(record: Path, about: dict[str, object]) -> None:
    """Say beside the folder what comes into it."""
    write(record, json.dumps(about, indent=2) + "\n")
