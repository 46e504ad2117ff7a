"""`distill eval`: what was asked for is checked, measured, shown and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from distill.console import out as console
from distill.console import results_table, speed_table
from distill.data.encode import device as device_of
from distill.evaluation import subject
from distill.evaluation.results_file import PARTS, Figures
from distill.evaluation.subject import Subject
from distill.files import check_writable
from eval.protocols.measure import Protocol
from eval.protocols.measure import protocol as protocol_of
from eval.stream import Processes
from teachers.errors import UserError, cut, nearest

AGAINST_STEPS = 18  # of the teacher beside the subject, by default
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Request:
    """What `distill eval` is asked for.

    Attributes:
        steps: Counts, separated by commas; empty for all of a student's.
        how: Of teachers: solver, guidance, null_label.
        few: Of a teacher without training: schedule, adaptive, cache.
        json_file: Where the figures are kept.
    """

    source: str
    protocol: str | None
    steps: str
    seeds: int | None
    against: str | None
    against_steps: int | None
    how: dict[str, Any]
    few: dict[str, Any]
    precision: Any
    speed: bool
    json_file: Path | None


@dataclass(frozen=True)
class Subjects:
    """What is measured, once it is known that it can be.

    Attributes:
        beside: The teacher that is measured beside the subject, and in how many steps.
    """

    found: Subject
    counts: list[int]
    beside: Subject | None
    beside_steps: int
    beside_name: str


def evaluate(request: Request) -> None:
    """Measure what the request names, show it, and write it where it says.

    Raises:
        UserError: the request cannot be met; nothing has been written.
    """
    request = check(request)
    measure = None if request.protocol is None else protocol_of(request.protocol)
    wanted = counts_in(request.steps)
    device = device_of()
    # without `cpu`, processes on CPUs do not know of one another
    state = PartialState(cpu=device.type == "cpu")
    processes = Processes(state.process_index, state.num_processes)
    if request.speed and processes.count > 1:
        raise UserError("--speed: it is of one process; start it without a launcher")
    file = None if request.json_file is None else figures_of(request, request.json_file)
    subjects = subjects_of(request, wanted, device)
    if file is not None:
        state.wait_for_everyone()  # all have looked before anything is there
        if state.is_main_process:
            file.open()
        state.wait_for_everyone()
    tree: dict[str, Any] = {}
    if measure is not None:
        seeds = measure.seeds if request.seeds is None else request.seeds
        records = [file and file.record(part) for part in PARTS]
        tree["protocol"] = request.protocol
        tree |= quality(subjects, request.protocol, measure, seeds, processes, records)
    if request.speed:
        tree["speed"] = speeds(subjects, device)
    if file is not None and not processes.rank:
        file.close(tree)
    state.wait_for_everyone()  # a process that leaves earlier can abort as the group closes


def check(request: Request) -> Request:
    """The request with its defaults filled in.

    Raises:
        UserError: an option does not go with the others, or its value is not one.
    """
    if request.against is None and request.against_steps is not None:
        raise UserError("--against-steps: it is for --against, which names a teacher; add that")
    if request.against_steps is None:
        request = replace(request, against_steps=AGAINST_STEPS)
    if request.protocol is None and not request.speed:
        request = replace(request, protocol=subject.usual_protocol(request.source))
    if request.protocol is None and request.seeds is not None:
        raise UserError("--seeds: it is for --protocol; a speed has none")
    if request.precision not in (None, *PRECISIONS):
        remedy = nearest(request.precision, PRECISIONS)
        raise UserError(f"--precision {cut(request.precision)}: {remedy}")
    return request


def counts_in(steps: str) -> list[int]:
    """The counts in "1,2,4"; none in an empty text.

    Raises:
        UserError: one is no whole number from 1.
    """
    words = [word.strip() for word in steps.split(",")] if steps else []
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--steps {cut(steps)}: expected whole numbers from 1, such as 1,2,4")
    return [int(word) for word in words]


def figures_of(request: Request, path: Path) -> Figures:
    """The file of figures, which says what they are of.

    Raises:
        UserError: it, or a record beside it, cannot be written.
    """
    about = {"source": request.source, "protocol": request.protocol}
    about |= {"precision": request.precision, **request.how, **request.few}
    if request.against is not None:
        about |= {"against": request.against, "against_steps": request.against_steps}
    file = Figures(path, about)
    for part in PARTS:
        check_writable(file.record(part), "--json")
    return file


def subjects_of(request: Request, wanted: list[int], device: Any) -> Subjects:
    """The subject and the teacher beside it, loaded, and the step counts.

    Raises:
        UserError: one cannot be loaded, or has no such count, or the two do not compare.
    """
    how, few, precision = request.how, request.few, request.precision
    if subject.is_student(request.source):
        subject.refuse(few, "a student has no such choice")
        if request.against is None:
            subject.refuse(how, "a student has no such choice; it is for --against")
        found = subject.student(request.source, device, precision)
    else:
        found = subject.teacher(request.source, device, **how, **few, precision=precision)
    counts = wanted or list(found.counts or (1, 2, 4))
    found.check(counts)
    beside = None
    if request.against is not None:
        beside = subject.teacher(request.against, device, **how, precision=precision)
        subject.check_against(found, beside)
    assert request.against_steps is not None  # `check` has filled it in
    return Subjects(found, counts, beside, request.against_steps, str(request.against))


def quality(
    subjects: Subjects,
    name: str | None,
    measure: Protocol,
    seeds: int,
    processes: Processes,
    records: Sequence[Path | None],
) -> dict[str, Any]:
    """The figures of the subject at every count, and of the teacher beside it; a table is shown."""
    found, other = subjects.found, subjects.beside
    rows = subject.evaluate(found, measure, subjects.counts, seeds, processes, records[0])
    tree: dict[str, Any] = {found.who: rows}
    shown, base = subject.shown(found, rows), None
    if other is not None:
        for k in subjects.counts:
            near = subject.agreement(found, other, measure.prompts, k, subjects.beside_steps)
            rows[str(k)].update(near)
        steps = [subjects.beside_steps]
        full = subject.evaluate(other, measure, steps, seeds, processes, records[1])
        tree["against"] = full
        beside = subject.shown(replace(other, who=subjects.beside_name), full)
        base, shown = next(iter(beside)), beside | shown
    if not processes.rank:
        over = f"{seeds} seeds; ± over seeds" if seeds > 1 else "one seed"
        title = f"{name}: {len(measure.prompts):,} samples, {over}"
        console.print(results_table(title, shown, base=base))
    return tree


def speeds(subjects: Subjects, device: Any) -> dict[str, Any]:
    """The speed of the subject at every count, and of the teacher beside it; tables are shown."""
    tree = {subjects.found.who: subject.speeds(subjects.found, subjects.counts, device)}
    console.print(speed_table(subjects.found.who, tree[subjects.found.who]))
    if subjects.beside is not None:
        tree["against"] = subject.speeds(subjects.beside, [subjects.beside_steps], device)
        console.print(speed_table(subjects.beside_name, tree["against"]))
    return tree
