"""What an objective is: whose turn it is, and from which loss; nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from students.generator import Generator
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError

Learns = Literal["chains", "all-times", "one-chain"]


class Batch(NamedTuple):
    """What one loss is computed from.

    x: data (B, ...), or None for objectives that need none.
    noise: unit noise (B, ...), shaped like a datum; the source's own where it stores noise.
    cond: the condition of each sample, entries (B, ...), or None.
    items: the number of each sample's item in its source, or in its bucket where there are several,
        (B,) int64 on the host; None of a batch that no source made.
    """

    x: Tensor | None
    noise: Tensor
    cond: Cond = None
    items: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """x, for objectives that declared that they need it."""
        assert self.x is not None, "this objective must declare needs_data"
        return self.x


class Loss(NamedTuple):
    """A scalar to descend, and scalars to log. Tensors stay on the device until they are logged.

    samples: the student's x̂ (B, ...) with its graph, in losses of the student's turn that have one:
        what a reward or a feature loss can be added on.
    """

    value: Tensor
    logs: dict[str, Tensor] = {}
    samples: Tensor | None = None


class _Turn(NamedTuple):
    players: tuple[str, ...]
    loss: Callable[[Batch], Loss]
    reset: bool = False


class Turn(_Turn):
    """One update: the players that learn, and the loss that they minimise together.

    reset: First clear their optimiser state, restart their learning-rate schedules, and restart the
        student's average if the student is one of them. `fresh` is the old name of this argument.
    """

    __slots__ = ()

    def __new__(
        cls,
        players: tuple[str, ...],
        loss: Callable[[Batch], Loss],
        reset: bool = False,
        fresh: bool = False,
    ) -> Turn:
        return super().__new__(cls, players, loss, reset or fresh)


@dataclass(kw_only=True)
class Objective:
    """Teaches a student. Fields are the networks it plays with, then its hyper-parameters.

    A field typed `Denoiser` beyond the teacher is a trainable copy of it; one typed `Critic` is a
    critic on the field `fake`; both become players of their field's name. Every other field is a
    hyper-parameter, and so a key of the recipe's `objective` section.

    An objective knows nothing of optimisers, devices, EMA or logging: it says who learns from
    what, and the engine does the rest.
    """

    teacher: Denoiser
    student: Generator

    # Whether batches must hold real data: always, never, or only when there is a critic.
    needs_data: ClassVar[Literal["always", "never", "critic"]] = "always"
    # Whether the student is a few-step copy in a stock form, or the teacher's network as it is.
    few_step: ClassVar[bool] = True
    # What the student learns: the chains of the counts that it is trained for; every time, so that
    # every count comes for nothing; or the one chain of all its steps.
    learns: ClassVar[Learns] = "chains"

    def turns(self, step: int) -> Iterator[Turn]:
        """The updates that make up step `step`, in order.

        What follows a `yield` runs once that turn has been played, so state may change there. The
        first turn of step 0 is also asked of a copy, before training, and not played; where the
        class is the user's own, the loss of that turn is computed as well.
        """
        yield Turn(("student",), partial(self.loss, step=step))

    def loss(self, batch: Batch, step: int) -> Loss:
        """The student's loss, for objectives in which only the student learns."""
        raise UserError(
            f"objective.name: {type(self).__name__}: it has no loss; "
            "define loss(self, batch, step) -> Loss"
        )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the players: nested dicts, lists, numbers, tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
