"""Rewards of a recipe: functions of the student's images that its loss shall raise.

RG-LCD (arXiv:2403.11027) and ReFL (arXiv:2304.05977) differentiate a reward through the last step
of the student. Here -β R is added to any loss of the student's turn that has samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.data.stream import Source
from distill.objectives.base import Batch, Loss, Objective, Turn
from distill.rewards.preference import PREFERENCES, preference
from eval import shapes
from eval.shapes.classifier import classifier, labels
from teachers.errors import UserError, clipped, first_line, nearest
from teachers.storage.plugin import function_at, is_function
from teachers.teacher import Teacher

# Images (B, C, H, W) in [-1, 1] with their graph, and their prompts or labels -> (B,).
Function = Callable[[Tensor, Sequence[Any]], Tensor]


def reward_of(
    recipe: Recipe, teacher: Teacher, source: Source, needs_gradient: bool = True
) -> Callable[[Tensor, Batch], Tensor]:
    """The weighted sum of a recipe's rewards (B,), of data (B, ...) and the batch they are for.

    Args:
        needs_gradient: Whether the loss takes the gradient of each, where images have one.

    Raises:
        UserError: there is no such function, or the data source keeps no prompts.
    """
    if source.prompts is None:
        raise UserError(
            "rewards: they read prompts or labels, which are not known of these pairs; name their "
            "data.prompts, and make them without data.inverted"
        )
    rewards = recipe.rewards.items()
    for key, section in rewards:
        if section.function == "shapes" and teacher.codec.classes:
            raise UserError(
                f"rewards.{key}.function: shapes reads captions, and this teacher has labels; name "
                "a function of your own"
            )
    functions = [(k, function_of(r.function, k), r.weight) for k, r in rewards]
    prompts, vae = source.prompts, teacher.codec.vae
    if vae is not None:
        vae.requires_grad_(False)

    def reward(x: Tensor, batch: Batch) -> Tensor:
        assert batch.items is not None
        if vae is not None:
            vae.to(x.device)
        images, texts = (
            teacher.codec.decode_with_graph(x),
            [prompts[i] for i in batch.items.tolist()],
        )
        values = [called(f, k, images, texts) for k, f, _ in functions]
        if needs_gradient and images.requires_grad:
            for (key, _, _), value in zip(functions, values, strict=True):
                check_gradient(value, f"rewards.{key}.function")
        weights = [w for _, _, w in functions]
        return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)

    return reward


def function_of(name: str, key: str) -> Function:
    """The built-in reward, or the user's.

    Raises:
        UserError: there is no such function.
    """
    if name in PREFERENCES:
        return preference(name)
    if name == "shapes":
        return caption_certainty
    if not is_function(name):
        known = nearest(name, [*PREFERENCES, "shapes"])
        raise UserError(
            f"rewards.{key}.function: {clipped(name)!r} is no built-in reward; {known}; or write "
            "path/to/file.py:function"
        )
    return function_at(name, f"rewards.{key}.function")


def rehearse(objective: Objective, source: Source, place: Any) -> None:
    """Call an objective's rewards once for the first data or noise of a source, before training.

    Args:
        place: The device to compute on.

    Raises:
        UserError: a function raises an exception, or its values are no finite numbers, one for
            each image; or they have no gradient, unless the objective needs none.
    """
    reward = objective.reward
    assert reward is not None
    batch = source.batch(0, 0, 1, min(2, source.size))
    x = (batch.noise if batch.x is None else batch.x).to(place).requires_grad_(True)
    value = reward(x, batch)
    if not objective.needs_reward or objective.differentiates_reward:
        check_gradient(value)
    if not value.isfinite().all():
        shown = value.detach().tolist()
        raise UserError(f"rewards: of the first images they are {shown}; return finite numbers")


def called(function: Function, name: str, images: Tensor, prompts: Sequence[Any]) -> Tensor:
    """A function's values (B,).

    Args:
        name: The reward's, for messages.

    Raises:
        UserError: it raises an exception, or does not return one number for each image.
    """
    try:
        values = function(images, prompts)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"rewards.{name}.function: it raised {clipped(reason, 200)}; correct it"
        ) from None
    return checked(values, name, images)


def check_gradient(value: Tensor, key: str = "rewards") -> None:
    """Refuse rewards that the student cannot raise.

    Raises:
        UserError: they do not depend on the images in a differentiable way.
    """
    if not value.requires_grad:
        raise UserError(
            f"{key}: no gradient with respect to the images; compute it with differentiable "
            "operations of torch"
        )


def checked(values: Tensor, name: str, images: Tensor) -> Tensor:
    """A function's values.

    Raises:
        UserError: they are not one number for each image.
    """
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"rewards.{name}.function: it returned {shape}; return a tensor of ({len(images)},)"
        )
    return values


def caption_certainty(images: Tensor, prompts: Sequence[Any]) -> Tensor:
    """The log-probability (B,) of captions of the embedded shapes by their small classifier.

    The features of the protocol `shapes` are this network's, so its distance is no fair judge of a
    student of this reward. Its share of right captions is, as it is read from the pixels.
    """
    network = classifier().to(images.device)
    wanted = labels([shapes.parse(p) for p in prompts]).to(images.device)
    logits = [head.log_softmax(1) for head in network(images)]
    chosen = [row.gather(1, wanted[:, k : k + 1])[:, 0] for k, row in enumerate(logits)]
    return torch.stack(chosen).sum(0)


def rewarded(loss: Loss, batch: Batch, turn: Turn, objective: Objective) -> Loss:
    """A loss of the student's turn with its rewards, unless the objective adds them itself.

    Raises:
        UserError: the loss has no samples, or the rewards have no gradient.
    """
    reward = objective.reward
    if reward is None or objective.needs_reward or "student" not in turn.players:
        return loss
    if loss.samples is None:
        raise UserError(
            f"rewards: {type(objective).__name__} gives no samples of the student to reward; "
            "return Loss(value, logs, samples), or remove the section"
        )
    value = reward(loss.samples, batch).mean()
    check_gradient(value)
    return loss._replace(value=loss.value - value, logs={**loss.logs, "reward": value.detach()})
