"""Checks of what an objective yields and returns; each refusal says what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor

from distill.objectives.base import Loss, Objective, Turn
from teachers.errors import UserError, nearest


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
    if not (loss.samples is None or isinstance(loss.samples, Tensor)):
        raise UserError(f"{says} comes with samples that are {_a(loss.samples)}; give a tensor")
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
