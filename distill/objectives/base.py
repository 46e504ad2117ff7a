"""What an objective is: whose turn it is, and from which loss; nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor, nn

from students.generator import Generator
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError
from teachers.teacher import Teacher

Learns = Literal["chains", "all-times", "one-chain"]


class Batch(NamedTuple):
    """What one loss is computed from.

    x: data (B, ...), or None for objectives that need none.
    noise: unit noise (B, ...), shaped like a datum; the source's own where it stores noise.
    cond: the condition of each sample, entries (B, ...), or None.
    items: the number of each sample's item in its source, (B,) int64 on the host; None of a batch
        that no source made.
    path: of pairs with `data.states`, the states of the teacher's trajectory (B, T, ...) from the
        noise to x, at quadratic times; the last is x.
    """

    x: Tensor | None
    noise: Tensor
    cond: Cond = None
    items: Tensor | None = None
    path: Tensor | None = None

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


class Auxiliary(nn.Module):
    """A trainable network of an objective that is no denoiser: a weighting w(t), an external guide.

    A field of an objective typed by a subclass is a player of the field's name; its weights are
    saved in checkpoints, and not exported.
    """

    @classmethod
    def for_objective(cls, teacher: Teacher) -> Self:
        """The network before training, in float32.

        Args:
            teacher: Unguided, with its codec and the shape of a datum.
        """
        return cls()


@dataclass(kw_only=True)
class Objective:
    """Trains a student. Its fields are its networks, then its hyper-parameters.

    A field typed `Denoiser` beyond the teacher is a trainable copy of it; one typed `Critic` is a
    critic on the field `fake`, or on the teacher where there is none; one typed by a subclass of
    `Auxiliary` is that network. All become players of their field's name. Every other field is a
    hyper-parameter, and so a key of the recipe's `objective` section.

    An objective yields whose turn it is and computes losses. Optimisers, devices, the student's
    average and logging are the engine's.
    """

    teacher: Denoiser
    student: Generator

    # Whether batches must hold real data: always, never, or only when there is a critic. "pairs":
    # data that the teacher's ODE leads the batch's noise to.
    needs_data: ClassVar[Literal["always", "never", "critic", "pairs"]] = "always"
    # Whether pairs must hold states of the teacher's trajectory (`Batch.path`).
    needs_states: ClassVar[bool] = False
    # Whether the student is a few-step copy in a stock form, or the teacher's network as it is.
    few_step: ClassVar[bool] = True
    # The player that a run trains above all: it keeps the average of its weights, and leaves them.
    # Where it is not the student, there is none, and the field `student` is the teacher itself.
    trains: ClassVar[str] = "student"
    # What the student learns: the chains of the step counts that it is trained for; every time, and
    # so every count; or the one chain of all its steps.
    learns: ClassVar[Learns] = "chains"
    # Whether it learns chains, and is called at times between their steps as well.
    between_steps: ClassVar[bool] = False
    # Whether the student's network reads the time s that its step lands on: denoiser(x_t, t, c, s).
    two_times: ClassVar[bool] = False
    # Whether the loss takes derivatives of the student's network along time.
    differentiates_time: ClassVar[bool] = False
    # Whether the student's x̂ is guided as the teacher's is, in training and by its pipeline.
    mixes_student: ClassVar[bool] = False
    # Fields that are shares of a part's samples: none may round to no sample or to all of them.
    shares: ClassVar[tuple[str, ...]] = ()
    # Inherited fields that the loss never reads; a recipe may not set them.
    unused: ClassVar[tuple[str, ...]] = ()
    # Whether the objective calls `reward` itself; otherwise a recipe's rewards are added to every
    # loss of the student's turn.
    needs_reward: ClassVar[bool] = False
    # Of such an objective, whether its loss takes the rewards' gradient, which they must then have.
    differentiates_reward: ClassVar[bool] = False
    # The weighted rewards (B,) of the student's x̂ (B, ...) with its graph, for the prompts of a
    # batch; None where the recipe has no rewards.
    reward: Callable[[Tensor, Batch], Tensor] | None = field(default=None, init=False)

    @property
    def last_stage(self) -> int:
        """The step at which the last stage begins; 0 where there is one stage."""
        return 0

    @property
    def loss_features(self) -> str:
        """Which features of a frozen network the loss compares; empty for none. It is recorded in
        summary.json and on the report's page. Fake score and student are no frozen networks.
        """
        critic = getattr(self, "critic", None)
        if critic is None or critic.source in ("fake", "student"):
            return ""
        return f"{critic.source}'s {', '.join(critic.blocks)}, which the critic reads"

    def check_batch(self, shape: tuple[int, ...]) -> None:
        """Refuse data or parts of a batch that the loss cannot be computed of, before training.

        Args:
            shape: Of the data of a part, (B, ...). B is `train.batch` over `train.accumulate`, or
                over the number of processes if that is larger.

        Raises:
            UserError: naming the key.
        """
        for name in self.shares:
            share, size = getattr(self, name), shape[0]
            if 0 < share < 1 and (count := round(share * size)) in (0, size):
                raise UserError(
                    f"objective.{name}: {share:g} of a part of {size} samples is {count}; change "
                    "it, raise train.batch, or lower train.accumulate"
                )

    def turns(self, step: int) -> Iterator[Turn]:
        """The updates that make up step `step`, in order.

        What follows a `yield` runs once that turn has been played, so state may change there.
        Before training, the first turn of step 0 is also taken from a copy of the objective and
        checked. It is not played, but the loss of a user's own class is computed once.
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
        """Restore what `state_dict` returned."""


def networks_in(objective: Objective) -> dict[str, nn.Module]:
    """The networks among an objective's attributes, by name."""
    return {k: v for k, v in vars(objective).items() if isinstance(v, nn.Module)}
