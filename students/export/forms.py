"""The forms of students, and which one a teacher's students have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from students import own_network, schedulers
from students.architecture.foreign import host_teacher
from students.architecture.get import KEY as NETWORK
from students.export import folder as folders
from students.export import own_folder
from students.export.encoders import RecordedEncoders
from students.export.unquantised import unquantised
from students.form import StudentForm, StudentRequest
from students.gaussian import GaussianForm
from students.generator import Generator, Renoise
from students.lora import Adapter, to_float32
from students.quantisation.training import with_rounded_weights
from teachers.analytic import Gaussian
from teachers.denoiser import Denoiser
from teachers.errors import UserError, clipped, teacher_at
from teachers.teacher import Teacher


@dataclass(frozen=True)
class StockForm(StudentForm):
    """Few-step students that stock diffusers pipelines sample (`students/schedulers.py`).

    scheduler: The scheduler form of all its students; None computes it for each.
    """

    scheduler: schedulers.SchedulerForm | None = None

    leaves_pipeline = True
    adapts = True

    def fixed(self, steps: int, start: float | None, renoise: Renoise) -> StockForm:
        """This form with the scheduler computed now: it takes values, which fake tensors lack."""
        source = schedulers.source_of(self.teacher)
        return replace(self, scheduler=schedulers.form(source, steps, start, renoise))

    def student(
        self, steps: int, start: float | None, renoise: Renoise, adapter: Adapter | None
    ) -> Generator:
        form = self.scheduler or self.fixed(steps, start, renoise).scheduler
        assert form is not None
        return schedulers.student_in(form, self.teacher, adapter)

    def network(self) -> Denoiser:
        return copied(self.teacher)

    def rehearsal(self, device: torch.device) -> Callable[[Generator], None]:
        encoders = RecordedEncoders(self.teacher, device)
        with suppress(Exception):  # the rehearsal encodes them again, and names the fault
            encoders.condition(folders.prompts_of(self.teacher))
        return partial(folders.rehearse, teacher=self.teacher, encoders=encoders)

    def export(self, student: Generator, folder: Path, recipe: Mapping[str, Any]) -> Generator:
        student = with_rounded_weights(unquantised(student, self.teacher))
        folders.export(student, self.teacher, folder, recipe)
        return student


class NetworkForm(StudentForm):
    """The teacher's own network under training: a teacher is made, and no few-step student."""

    adapts = True  # other networks than the student

    def check(self, request: StudentRequest) -> None:
        if request.steps != 1:
            raise UserError(
                f"student.steps: {request.objective} makes a teacher, which takes as many as its "
                "sampler; remove it"
            )

    def student(
        self, steps: int, start: float | None, renoise: Renoise, adapter: Adapter | None
    ) -> Generator:
        return Generator(deepcopy(self.teacher.denoiser).requires_grad_(True))

    def network(self) -> Denoiser:
        return copied(self.teacher)

    def export(self, student: Generator, folder: Path, recipe: Mapping[str, Any]) -> Generator:
        raise NotImplementedError("`distill teach` saves the network in a pipeline of its own")


class OwnForm(StudentForm):
    """Few-step students of a network of the user's own (`students/own_network.py`)."""

    adapts = True

    @property
    def draws_pictures(self) -> bool:
        with torch.no_grad():
            shape = self.teacher.codec.decode(torch.zeros(1, *self.teacher.shape)).shape
        return len(shape) == 4 and shape[1] in (1, 3)

    def check(self, request: StudentRequest) -> None:
        own_network.check(self.teacher)

    def student(
        self, steps: int, start: float | None, renoise: Renoise, adapter: Adapter | None
    ) -> Generator:
        return own_network.student(self.teacher, steps, start, renoise, adapter)

    def network(self) -> Denoiser:
        return copied(self.teacher)

    def rehearsal(self, device: torch.device) -> Callable[[Generator], None]:
        return partial(own_folder.rehearse, teacher=self.teacher)

    def export(self, student: Generator, folder: Path, recipe: Mapping[str, Any]) -> Generator:
        return own_folder.export(student, self.teacher, folder, recipe)


@dataclass(frozen=True)
class ForeignForm(OwnForm):
    """Few-step students of another network than the teacher's (students/architecture/foreign.py).

    network_name: As `host_teacher` has it.
    """

    network_name: str

    def check(self, request: StudentRequest) -> None:
        with self.blamed():
            host = host_teacher(self.teacher, self.network_name)
            own_network.check(host)
        if request.steps > 1 and not own_network.reads_time(host):
            raise UserError(
                f"student.steps: the network of {NETWORK} reads no time, so it could not tell "
                "its steps apart; set it to 1"
            )

    def student(
        self, steps: int, start: float | None, renoise: bool, adapter: Adapter | None
    ) -> Generator:
        host = host_teacher(self.teacher, self.network_name)
        return own_network.student(host, steps, start, renoise, adapter)

    def rehearsal(self, device: torch.device) -> Callable[[Generator], None]:
        tried = super().rehearsal(device)

        def rehearse(student: Generator) -> None:
            with self.blamed():
                tried(student)

        return rehearse

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Within it, messages about a network of the user's own name the student's."""
        try:
            yield
        except UserError as error:
            who, text = teacher_at(self.teacher.source), str(error)
            if not text.startswith(who):
                raise
            place = f"{NETWORK}: {clipped(self.network_name)!r}"
            raise UserError(place + text.removeprefix(who)) from None


def copied(teacher: Teacher) -> Denoiser:
    """A trainable copy of the teacher's network, in float32, as what learns is kept."""
    return to_float32(deepcopy(teacher.denoiser)).requires_grad_(True)


def form_of(teacher: Teacher, few_step: bool = True, network: str | None = None) -> StudentForm:
    """The form of a teacher's students.

    Args:
        few_step: Whether few-step students are trained, and not the network as it is.
        network: That of the students, if it is not the teacher's, as `host_teacher` has it.
    """
    if not few_step:
        return NetworkForm(teacher)
    if network is not None:
        return ForeignForm(teacher, network)
    if isinstance(teacher.denoiser, Gaussian):
        return GaussianForm(teacher)
    return (OwnForm if own_network.is_own(teacher.denoiser) else StockForm)(teacher)
