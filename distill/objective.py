"""What an objective is: whose turn it is, and from which loss; nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Gt, Interval
from pydantic import AllowInfNan, BeforeValidator, Strict
from torch import Tensor

from students.generator import Generator
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError, nearest

# Types for hyper-parameter fields; the recipe checks them before anything is built.
Count = Annotated[int, Strict(), Interval(ge=1, le=10**9)]
Whole = Annotated[int, Strict(), Interval(ge=0, le=10**9)]
Seed = Annotated[int, Strict(), Interval(ge=0, lt=2**63)]


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Finite = BeforeValidator(_not_a_switch), AllowInfNan(False)
Real = Annotated[float, *Finite]
Positive = Annotated[float, *Finite, Gt(0)]
NonNegative = Annotated[float, *Finite, Ge(0)]
Share = Annotated[float, *Finite, Interval(ge=0, le=1)]

Learns = Literal["chains", "all-times", "one-chain"]


class Batch(NamedTuple):
    """What one loss is computed from.

    x: data (B, ...), or None for objectives that need none.
    noise: unit noise (B, ...), shaped like a datum.
    cond: the condition of each sample, entries (B, ...), or None.
    """

    x: Tensor | None
    noise: Tensor
    cond: Cond = None

    @property
    def data(self) -> Tensor:
        """x, for objectives that declared that they need it."""
        assert self.x is not None, "this objective must declare needs_data"
        return self.x


class Loss(NamedTuple):
    """A scalar to descend, and scalars to log. Tensors stay on the device until they are logged."""

    value: Tensor
    logs: dict[str, Tensor] = {}


class Turn(NamedTuple):
    """One update: the players that move, and the loss they descend together.

    fresh: before it, clear their optimiser state, restart their learning-rate schedules, and
        restart the student's average if the student is one of them.
    """

    players: tuple[str, ...]
    loss: Callable[[Batch], Loss]
    fresh: bool = False


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
        raise UserError(f"{_named(self)}: it has no loss; define loss(self, batch, step) -> Loss")

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the players: nested dicts, lists, numbers, tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def check_first(objective: Objective, players: Collection[str]) -> None:
    """Refuse an objective whose first turn could not be played; no loss is computed.

    Raises:
        UserError: it names no turn, or one of players that there are not, or it has no loss.
    """
    kind = type(objective)
    if kind.turns is Objective.turns and kind.loss is Objective.loss:
        raise UserError(
            f"{_named(objective)}: it has no loss; define loss(self, batch, step) -> Loss, or turns"
        )
    turns = copy(objective).turns(0)  # a copy, as what it sets must not be set twice
    if not isinstance(turns, Iterator):
        raise UserError(
            f"{_named(objective)}: turns(0) gives {_a(turns)}; write `yield Turn((...,), loss)`"
        )
    if (first := next(turns, None)) is None:
        raise UserError(f"{_named(objective)}: turns(0) yields nothing; yield a Turn at every step")
    check_turn(first, objective, players)


def check_turn(turn: Any, objective: Objective, players: Collection[str]) -> None:
    """Refuse what an objective yielded if it is not a turn of these players."""
    says = f"{_named(objective)}: turns"
    if not isinstance(turn, Turn):
        raise UserError(f"{says} yields {_a(turn)}; yield Turn((...,), loss)")
    if not isinstance(turn.players, tuple) or not turn.players:
        raise UserError(
            f"{says} yields a Turn of players {turn.players!r}; give a tuple of one or more names, "
            f"such as ('student',)"
        )
    for name in turn.players:
        if name not in players:
            raise UserError(
                f"{says} names the player {name!r}, and it has no such player; "
                f"{nearest(str(name), players)}"
            )
    if not callable(turn.loss):
        raise UserError(f"{says} yields a Turn whose loss is {_a(turn.loss)}; give a function")
    bound = turn.loss.keywords if isinstance(turn.loss, partial) else {}
    try:
        inspect.signature(turn.loss).bind(None)
    except (TypeError, ValueError):  # the second of a partial that binds what there is not
        call = ", ".join(("batch", *(f"{k}=…" for k in bound)))
        raise UserError(
            f"{_named(objective)}: its loss is called as loss({call}) and does not take that; "
            "define it so, or bind the other arguments in the Turn"
        ) from None


def check_loss(loss: Any, objective: Objective) -> None:
    """Refuse what a turn's loss returned if nothing can descend it, or log what is beside it.

    Raises:
        UserError: it is no `Loss`, or holds other than scalars; or its value has no gradient.
    """
    says = f"{_named(objective)}: its loss"
    if not isinstance(loss, Loss):
        raise UserError(f"{says} returns {_a(loss)}; return Loss(value)")
    if wrong := _no_scalar(loss.value):
        raise UserError(f"{says} is {wrong}; its value is a scalar tensor, such as x.mean()")
    if not loss.value.is_floating_point():
        raise UserError(f"{says} is of {loss.value.dtype}; its value is of real numbers")
    if not loss.value.requires_grad:
        raise UserError(
            f"{says} depends on no weight of its turn's players; compute it from their networks, "
            "and detach nothing on the way"
        )
    if not isinstance(loss.logs, dict):
        raise UserError(f"{says} comes with logs that are {_a(loss.logs)}; give a dict of tensors")
    for key, value in loss.logs.items():
        if wrong := _no_scalar(value) or ("complex" if value.is_complex() else ""):
            raise UserError(f"{says} logs {key!r}, which is {wrong}; log real scalar tensors")


def _no_scalar(value: Any) -> str:
    """What a value is that is no scalar tensor; nothing for one."""
    if not isinstance(value, Tensor):
        return _a(value)
    return f"of shape {tuple(value.shape)}" if value.ndim else ""


def _named(objective: Objective) -> str:
    return f"objective.name: {type(objective).__name__}"


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
