"""`distill eval`: checks the request, measures, prints tables and writes the results file."""

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
from distill.evaluation.results_file import PARTS, ResultsFile
from distill.evaluation.subject import Subject
from distill.files import check_writable
from distill.publish.results_table import not_held_out
from distill.sampling import used_networks
from eval.protocols.measure import Protocol
from eval.protocols.measure import protocol as protocol_of
from eval.stream import Processes
from students.routing.folder import is_routed
from teachers.errors import UserError, cut, nearest
from teachers.storage.files import home

AGAINST_STEPS = 18  # of the teacher beside the subject, by default
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Request:
    """The arguments of `distill eval`.

    Attributes:
        steps: Step counts, separated by commas; empty for all of a student's.
        sampler: Options of teachers: solver, guidance, null_label.
        few_step: Options of teachers in few steps: schedule, adaptive, cache.
        json_file: The results file.
    """

    source: str
    protocol: str | None
    steps: str
    seeds: int | None
    against: str | None
    against_steps: int | None
    sampler: dict[str, Any]
    few_step: dict[str, Any]
    precision: Any
    speed: bool
    json_file: Path | None


@dataclass(frozen=True)
class Subjects:
    """What is measured, after all checks.

    Attributes:
        other: The teacher that is measured beside the main subject, in `other_steps` steps.
    """

    main: Subject
    counts: list[int]
    other: Subject | None
    other_steps: int
    other_name: str


def evaluate(request: Request) -> None:
    """Measure what the request names, print tables, and write the results file.

    Raises:
        UserError: the request is not valid; nothing has been written.
    """
    request = check(request)
    measure = None if request.protocol is None else protocol_of(request.protocol)
    counts = counts_in(request.steps)
    device = device_of()
    # without `cpu`, processes on CPUs do not find one another
    state = PartialState(cpu=device.type == "cpu")
    processes = Processes(state.process_index, state.num_processes)
    if request.speed and processes.count > 1:
        raise UserError("--speed: it measures one process; start it without a launcher")
    file = None if request.json_file is None else results_file(request, request.json_file)
    subjects = subjects_of(request, counts, device)
    if file is not None:
        state.wait_for_everyone()  # every process has read the files before one writes them
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
    """The request with its defaults.

    Raises:
        UserError: an option needs another one, or its value is not valid.
    """
    if request.against is None and request.against_steps is not None:
        raise UserError("--against-steps: it needs --against; name a teacher there")
    if request.against_steps is None:
        request = replace(request, against_steps=AGAINST_STEPS)
    if request.protocol is None and not request.speed:
        request = replace(request, protocol=subject.usual_protocol(request.source))
    if request.protocol is None and request.seeds is not None:
        raise UserError("--seeds: it needs --protocol; the speed alone uses no seeds")
    if request.precision not in (None, *PRECISIONS):
        remedy = nearest(request.precision, PRECISIONS)
        raise UserError(f"--precision {cut(request.precision)}: {remedy}")
    return request


def counts_in(steps: str) -> list[int]:
    """The step counts in a text such as "1,2,4"; an empty text has none.

    Raises:
        UserError: one is not a whole number from 1.
    """
    words = [word.strip() for word in steps.split(",")] if steps else []
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--steps {cut(steps)}: expected whole numbers from 1, such as 1,2,4")
    return [int(word) for word in words]


def results_file(request: Request, path: Path) -> ResultsFile:
    """The results file of a request.

    Raises:
        UserError: it, or a record beside it, cannot be written.
    """
    options = {"source": request.source, "protocol": request.protocol}
    options |= {"precision": request.precision, **request.sampler, **request.few_step}
    if request.against is not None:
        options |= {"against": request.against, "against_steps": request.against_steps}
    file = ResultsFile(path, options)
    for part in PARTS:
        check_writable(file.record(part), "--json")
    return file


def subjects_of(request: Request, counts: list[int], device: Any) -> Subjects:
    """The loaded subject, the teacher beside it, and the step counts.

    Raises:
        UserError: one cannot be loaded or has no such count, or their images differ in shape.
    """
    sampler, few_step, precision = request.sampler, request.few_step, request.precision
    if request.speed and is_routed(home(request.source)):
        raise UserError("--speed: these are several students; give one of them, or its run")
    if subject.is_student(request.source):
        subject.refuse_options(few_step, "this option is for teachers; leave it out")
        if request.against is None:
            reason = "this option is for teachers; leave it out, or give --against"
            subject.refuse_options(sampler, reason)
        main = subject.student(request.source, device, precision)
    else:
        options = {**sampler, **few_step, "precision": precision}
        main = subject.teacher(request.source, device, **options)
    counts = counts or list(main.counts or (1, 2, 4))
    main.check(counts)
    other = None
    if request.against is not None:
        other = subject.teacher(request.against, device, **sampler, precision=precision)
        subject.check_against(main, other)
    assert request.against_steps is not None  # `check` sets the default
    return Subjects(main, counts, other, request.against_steps, str(request.against))


def quality(
    subjects: Subjects,
    name: str | None,
    measure: Protocol,
    seeds: int,
    processes: Processes,
    records: Sequence[Path | None],
) -> dict[str, Any]:
    """The figures of the subject at every count, and of the teacher beside it; prints a table."""
    main, other = subjects.main, subjects.other
    rows = subject.evaluate(main, measure, subjects.counts, seeds, processes, records[0])
    tree: dict[str, Any] = {main.kind: rows}
    table, base = subject.table_rows(main, rows), None
    if other is not None:
        for k in subjects.counts:
            distances = subject.agreement(main, other, measure.prompts, k, subjects.other_steps)
            rows[str(k)].update(distances)
        steps = [subjects.other_steps]
        other_rows = subject.evaluate(other, measure, steps, seeds, processes, records[1])
        tree["against"] = other_rows
        others = subject.table_rows(replace(other, kind=subjects.other_name), other_rows)
        base, table = next(iter(others)), others | table
    if not processes.rank:
        spread = f"{seeds} seeds; ± over seeds" if seeds > 1 else "one seed"
        title = f"{name}: {len(measure.prompts):,} samples, {spread}"
        console.print(results_table(title, table, base=base))
    about = used_networks.record(main.used_networks, measure.name, rows)
    if not processes.rank and (line := not_held_out(about)):
        console.print(line)
    return tree | about


def speeds(subjects: Subjects, device: Any) -> dict[str, Any]:
    """The speed of the subject at every count, and of the teacher beside it; prints tables."""
    main, other = subjects.main, subjects.other
    tree = {main.kind: subject.speeds(main, subjects.counts, device)}
    console.print(speed_table(main.kind, tree[main.kind]))
    if other is not None:
        tree["against"] = subject.speeds(other, [subjects.other_steps], device)
        console.print(speed_table(subjects.other_name, tree["against"]))
    return tree
