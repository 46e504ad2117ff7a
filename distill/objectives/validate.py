"""Checks of the turns that an objective yields and of the losses it returns."""

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
    """Refuse an objective whose first turn cannot be played; no loss is computed.

    Args:
        players: The names of the objective's players.

    Raises:
        UserError: it yields no turn, its turn is no turn of these players, or it has no loss.
    """
    kind = type(objective)
    if kind.turns is Objective.turns and kind.loss is Objective.loss:
        raise UserError(
            f"{_key(objective)}: it has no loss; define loss(self, batch, step) -> Loss, or turns"
        )
    turns = copy(objective).turns(0)  # a copy: turns may change the objective
    if not isinstance(turns, Iterator):
        raise UserError(
            f"{_key(objective)}: turns(0) returns {_described(turns)}; "
            "write `yield Turn((...,), loss)`"
        )
    if (first := next(turns, None)) is None:
        raise UserError(f"{_key(objective)}: turns(0) yields nothing; yield a Turn at every step")
    check_turn(first, objective, players)


def check_turn(turn: Any, objective: Objective, players: Collection[str]) -> None:
    """Refuse what an objective yielded if it is not a turn of these players.

    Raises:
        UserError: naming the objective and what is wrong with the turn.
    """
    where = f"{_key(objective)}: turns"
    if not isinstance(turn, Turn):
        raise UserError(f"{where} yields {_described(turn)}; yield Turn((...,), loss)")
    if not isinstance(turn.players, tuple) or not turn.players:
        raise UserError(
            f"{where} yields a Turn of players {turn.players!r}; give a tuple of one or more "
            "names, such as ('student',)"
        )
    for name in turn.players:
        if name not in players:
            raise UserError(
                f"{where} names the player {name!r}, which does not exist; "
                f"{nearest(str(name), players)}"
            )
    if not callable(turn.loss):
        raise UserError(
            f"{where} yields a Turn whose loss is {_described(turn.loss)}; give a function"
        )
    bound = turn.loss.keywords if isinstance(turn.loss, partial) else {}
    try:
        inspect.signature(turn.loss).bind(None)
    except (TypeError, ValueError):  # ValueError: a partial binds an unknown argument
        call = ", ".join(("batch", *(f"{k}=…" for k in bound)))
        raise UserError(
            f"{_key(objective)}: its loss is called as loss({call}), which it does not accept; "
            "define it so, or bind the other arguments in the Turn"
        ) from None


def check_loss(loss: Any, objective: Objective) -> None:
    """Refuse what a turn's loss returned if it cannot be trained on or logged.

    Raises:
        UserError: it is no `Loss`; a value is no scalar; or the loss has no gradient.
    """
    where = f"{_key(objective)}: its loss"
    if not isinstance(loss, Loss):
        raise UserError(f"{where} returns {_described(loss)}; return Loss(value)")
    if fault := _scalar_fault(loss.value):
        raise UserError(f"{where} is {fault}; return a scalar tensor, such as x.mean()")
    if not loss.value.is_floating_point():
        raise UserError(f"{where} has dtype {loss.value.dtype}; return a floating-point scalar")
    if not loss.value.requires_grad:
        raise UserError(
            f"{where} depends on no weight of its turn's players; compute it from their networks, "
            "and detach nothing"
        )
    if not (loss.samples is None or isinstance(loss.samples, Tensor)):
        raise UserError(f"{where} has samples that are {_described(loss.samples)}; give a tensor")
    if not isinstance(loss.logs, dict):
        raise UserError(
            f"{where} has logs that are {_described(loss.logs)}; give a dict of tensors"
        )
    for key, value in loss.logs.items():
        if fault := _scalar_fault(value) or ("complex" if value.is_complex() else ""):
            raise UserError(f"{where} logs {key!r}, which is {fault}; log real scalar tensors")


def _scalar_fault(value: Any) -> str:
    """Why a value is no scalar tensor; empty for one."""
    if not isinstance(value, Tensor):
        return _described(value)
    return f"of shape {tuple(value.shape)}" if value.ndim else ""


def _key(objective: Objective) -> str:
    return f"objective.name: {type(objective).__name__}"


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
