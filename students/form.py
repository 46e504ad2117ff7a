"""What a form of students is: how they are built, checked, exported and measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from students.generator import Generator, Renoise
from students.lora import Adapter
from teachers.denoiser import Denoiser
from teachers.teacher import Teacher


class Normal(NamedTuple):
    """A normal distribution, by its mean (D,) and covariance (D, D)."""

    mean: Tensor
    cov: Tensor


class StudentRequest(NamedTuple):
    """What of a recipe a form may refuse.

    objective: its name.
    networks: the objective's fields that are networks.
    sections: the optional sections that the recipe has.
    steps: `student.steps`.
    sample_every: `train.sample_every`.
    """

    objective: str
    networks: Collection[str]
    sections: Collection[str]
    steps: int
    sample_every: int


@dataclass(frozen=True)
class StudentForm:
    """The form of a teacher's students: all that a run does with them outside their training."""

    teacher: Teacher

    # Whether a run leaves a pipeline that draws pictures: with a card, grids, a report, and figures
    # by a protocol.
    leaves_pipeline: ClassVar[bool] = False
    # Whether networks can be adapters on the teacher's weights.
    adapts: ClassVar[bool] = False

    @property
    def draws_pictures(self) -> bool:
        """Whether grids of images can be drawn of its samples."""
        return True

    def check(self, request: StudentRequest) -> None:
        """Refuse what students of this form cannot be, before any work.

        Raises:
            UserError: naming the key.
        """

    def student(
        self, steps: int, start: float | None, renoise: Renoise, adapter: Adapter | None
    ) -> Generator:
        """A trainable student, as `schedulers.student` describes the arguments.

        Raises:
            UserError: there is no such student.
        """
        raise NotImplementedError

    def network(self) -> Denoiser:
        """A trainable network that is not the student, such as a fake score."""
        raise NotImplementedError

    def rehearsal(self, device: torch.device) -> Callable[[Generator], None]:
        """Prepare to try the export of a student, before any network is on the device.

        Returns:
            A function of a student that has not been trained. It raises UserError where the export
            would fail after training.
        """
        return lambda student: None

    def export(self, student: Generator, folder: Path, recipe: Mapping[str, Any]) -> Generator:
        """Write the trained student to `folder`; the student as it is measured."""
        raise NotImplementedError

    def distributions(self, student: Generator) -> tuple[Normal, Normal] | None:
        """Of the student's samples and of the teacher's, where both have a closed form."""
        return None
