"""Rewards of a recipe: functions of the student's images that its loss shall raise.

Here their functions are found, tried and called; `terms` has how they join a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.data.stream import Source
from distill.objectives.base import Batch, Loss, Objective, Turn
from distill.objectives.trajectory.rg_lcd import LatentReward
from distill.rewards.preference import PREFERENCES, preference
from distill.rewards.terms import Rewards, Score, Term
from eval import shapes
from eval.shapes.classifier import HEADS, classifier, labels
from teachers.errors import UserError, clipped, first_line, nearest
from teachers.storage.plugin import function_at, is_function
from teachers.teacher import Teacher

# Images (B, C, H, W) in [-1, 1] with their graph, and their prompts or labels -> (B,).
Function = Callable[[Tensor, Sequence[Any]], Tensor]


def reward_of(
    recipe: Recipe, teacher: Teacher, source: Source, needs_gradient: bool = True
) -> Rewards | None:
    """A recipe's rewards, for the prompts of a data source; None where all are held out.

    Args:
        needs_gradient: Whether the loss takes the gradient of direct ones, where images have one.

    Raises:
        UserError: there is no such function, or the data source keeps no prompts.
    """
    if all(section.held_out for section in recipe.rewards.values()):
        return None
    if source.prompts is None:
        raise UserError(
            "rewards: they read prompts or labels, which are not known of these pairs; name their "
            "data.prompts, and make them without data.inverted"
        )
    terms = [t for t in terms_of(recipe, teacher) if not t.section.held_out]
    return Rewards(terms, source.prompts, needs_gradient)


def held_out_of(recipe: Recipe, teacher: Teacher) -> Score | None:
    """The weighted sum (N,) of the rewards that no loss contains, of data (N, ...) and prompts.

    Raises:
        UserError: there is no such function.
    """
    terms = [t for t in terms_of(recipe, teacher) if t.section.held_out]

    def score(x: Tensor, prompts: Sequence[Any], graph: bool = False) -> Tensor:
        values = [t.section.weight * t.score(x, prompts, graph) for t in terms]
        return torch.stack(values).sum(0)

    return score if terms else None


def terms_of(recipe: Recipe, teacher: Teacher) -> list[Term]:
    """All rewards of a recipe.

    Raises:
        UserError: there is no such function, it reads what this teacher does not, or a built-in one
            has a network of another name.
    """
    if (vae := teacher.codec.vae) is not None and recipe.rewards:
        vae.requires_grad_(False)
    found = []
    for key, section in recipe.rewards.items():
        if section.kind == "ranked" and len(teacher.shape) != 3:
            raise UserError(
                f"rewards.{key}.kind: ranked orders data of (C, H, W), and the teacher's are "
                f"{tuple(teacher.shape)}; set it to direct or weighted"
            )
        if section.function in CERTAINTIES and teacher.codec.classes:
            raise UserError(
                f"rewards.{key}.function: {section.function} reads captions, and this teacher has "
                "labels; name a function of your own"
            )
        function = function_of(section.function, key)
        if section.network is not None and not is_function(section.function):
            raise UserError(
                f"rewards.{key}.network: that of {section.function} is known; remove it"
            )
        score = score_of(key, function, teacher)
        surrogate = LatentReward.for_objective(teacher) if section.kind == "ranked" else None
        found.append(Term(section, score, surrogate))
    return found


def score_of(key: str, function: Function, teacher: Teacher) -> Score:
    """A reward of data: of the images that they decode to.

    Args:
        key: The reward's name, for messages.
    """
    codec = teacher.codec

    def score(x: Tensor, prompts: Sequence[Any], graph: bool) -> Tensor:
        if codec.vae is not None:
            codec.vae.to(x.device)
        images = codec.decode_with_graph(x)
        value = called(function, key, images, prompts)
        if graph and images.requires_grad:
            check_gradient(value, f"rewards.{key}.function")
        return value

    return score


def function_of(name: str, key: str) -> Function:
    """The built-in reward, or the user's.

    Raises:
        UserError: there is no such function.
    """
    if name in PREFERENCES:
        return preference(name)
    if name in CERTAINTIES:
        return CERTAINTIES[name]
    if not is_function(name):
        known = nearest(name, [*PREFERENCES, *CERTAINTIES])
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
    if reward is None:
        return
    batch = source.batch(0, 0, 1, min(2, source.size))
    x = (batch.noise if batch.x is None else batch.x).to(place).requires_grad_(True)
    value = reward(x, batch)
    taken = not objective.needs_reward or objective.differentiates_reward
    if getattr(reward, "differentiates", taken):
        check_gradient(value)
    check_finite(value, "the first images")


@torch.no_grad()
def rehearse_held_out(recipe: Recipe, teacher: Teacher, prompts: Sequence[Any]) -> None:
    """Call the rewards that are held out once, of noise, before training.

    Args:
        prompts: Of the samples that are tried, or labels.

    Raises:
        UserError: a function raises an exception, or its values are no finite numbers, one for
            each image.
    """
    score = held_out_of(recipe, teacher)
    if score is not None and prompts:
        rng = torch.Generator().manual_seed(recipe.train.seed)
        x = torch.randn(len(prompts), *teacher.shape, generator=rng)
        check_finite(score(x, prompts, False), "noise")


def called(function: Function, name: str, images: Tensor, prompts: Sequence[Any]) -> Tensor:
    """A function's values (B,).

    Args:
        name: The reward's, for messages.

    Raises:
        UserError: it raises an exception, or does not return one number for each image.
    """
    try:
        values = function(images, prompts)
    except UserError as error:  # a built-in one's, which does not know its name in the recipe
        reason = str(error).removeprefix("rewards: ")
        raise UserError(f"rewards.{name}.function: {reason}") from None
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"rewards.{name}.function: it raised {clipped(reason, 200)}; correct it"
        ) from None
    return checked(values, name, images)


def check_finite(value: Tensor, what: str) -> None:
    """Refuse rewards (B,) that no loss and no comparison could use.

    Raises:
        UserError: naming them, and of what they are.
    """
    if not value.isfinite().all():
        shown = value.detach().tolist()
        raise UserError(f"rewards: of {what} they are {shown}; return finite numbers")


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
    """A function's values, in floating point.

    Raises:
        UserError: they are not one number for each image.
    """
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"rewards.{name}.function: it returned {shape}; return a value for each image, a "
            f"tensor of ({len(images)},)"
        )
    if values.is_complex():
        raise UserError(f"rewards.{name}.function: it returned complex numbers; return real ones")
    return values if values.is_floating_point() else values.float()


def caption_certainty(
    images: Tensor, prompts: Sequence[Any], attributes: Sequence[int] = range(len(HEADS))
) -> Tensor:
    """The log-probability (B,) of captions of the embedded shapes by their small classifier.

    Args:
        attributes: Which of a scene's count, by their place in `Scene`; by default all.

    The features of the protocol `shapes` are this network's, so its distance is no fair judge of a
    student of this reward. Its share of right captions is, as it is read from the pixels.
    """
    network = classifier().to(images.device)
    wanted = labels([shapes.parse(p) for p in prompts]).to(images.device)
    logits = [head.log_softmax(1) for head in network(images)]
    chosen = [logits[k].gather(1, wanted[:, k : k + 1])[:, 0] for k in attributes]
    return torch.stack(chosen).sum(0)


# By the name of a recipe: of all that a caption says, or of one attribute.
CERTAINTIES: dict[str, Function] = {
    "shapes": caption_certainty,
    **{
        f"shapes-{name}": partial(caption_certainty, attributes=(place,))
        for place, name in enumerate(shapes.Scene._fields)
    },
}


def rewarded(loss: Loss, batch: Batch, turn: Turn, objective: Objective, step: int = 0) -> Loss:
    """A loss of the student's turn with its rewards, unless the objective adds them itself.

    Args:
        step: Of training, on which their weights may depend.

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
    if isinstance(reward, Rewards):
        return reward.added(loss, batch, step)
    value = reward(loss.samples, batch).mean()
    check_gradient(value)
    return loss._replace(value=loss.value - value, logs={**loss.logs, "reward": value.detach()})
