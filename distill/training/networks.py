"""The networks of an objective: teacher, student, critic, and the others that its fields name."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from distill.config.recipe import Recipe, networks_of
from distill.config.schema import CriticSection, StudentSection
from distill.objectives.base import Objective
from distill.sampling.guided_teacher import guided
from students import gaussian, schedulers
from students.critic import Critic
from students.generator import Generator
from students.lora import (
    Adapted,
    Adapter,
    adapted,
    checkpointing,
    to_float32,
    unwrap,
)
from students.schedulers import SchedulerForm
from teachers.denoiser import Network
from teachers.errors import UserError
from teachers.teacher import Teacher


def objective_of(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The recipe's objective with its networks on the device, in eval mode."""
    return assembled(recipe, build_networks(recipe, teacher), device)


def assembled(recipe: Recipe, networks: dict[str, nn.Module], device: torch.device) -> Objective:
    """The recipe's objective with these networks, all moved to the device and in eval mode."""
    for network in networks.values():
        network.to(device).eval()  # dropout would differ between teacher, fake and student
    keys = {k: v for k, v in recipe.objective.items() if k != "name"}
    schema = recipe.keys_schema().model_validate(keys)
    return recipe.kind(**networks, **{k: getattr(schema, k) for k in keys})  # pyright: ignore


def build_networks(
    recipe: Recipe, teacher: Teacher, form: SchedulerForm | None = None
) -> dict[str, nn.Module]:
    """The networks that the objective's fields name, by field.

    Args:
        form: The student's, where it must be made before: it takes values, not only shapes.

    Raises:
        UserError: the teacher, the student, the adapters or the critic do not go together.
    """
    names = [n for n in networks_of(recipe.kind) if n not in ("teacher", "student", "critic")]
    if linear_student(recipe, teacher):
        scores: dict[str, nn.Module] = {n: gaussian.score(teacher) for n in names}
        return scores | {
            "student": gaussian.student(teacher),
            "teacher": guided(recipe.teacher, teacher),
        }
    adapters = shared_weights(recipe, names)
    # copies first: a copy that is made after the adapters would contain them
    networks: dict[str, nn.Module] = {
        n: to_float32(deepcopy(teacher.denoiser)).requires_grad_(True)
        for n in names
        if n not in adapters
    }
    if recipe.kind.few_step:
        form = form or student_form(recipe.student, teacher)
        student = schedulers.student_in(form, teacher, adapters.get("student"))
        counts = recipe.student.trained(recipe.kind.learns, student.counts)
        networks["student"] = student.keep(*counts, weights=list(counts.values()))
    else:
        networks["student"] = Generator(deepcopy(teacher.denoiser).requires_grad_(True))
    for name in [n for n in names if n in adapters]:
        networks[name] = adapted(teacher, adapters[name], name)
    networks["teacher"] = guided(recipe.teacher, teacher)
    if recipe.critic is not None:
        networks["critic"] = critic_of(recipe.critic, networks["fake"], teacher)
    if recipe.train.checkpointing:
        for backbone in backbones(networks):
            checkpointing(backbone)
    return networks


def linear_student(recipe: Recipe, teacher: Teacher) -> bool:
    """Whether the student is the linear one of a closed-form Gaussian teacher."""
    return recipe.kind.few_step and gaussian.exact(teacher)


def student_form(student: StudentSection, teacher: Teacher) -> SchedulerForm:
    """The stock form of a few-step student.

    Raises:
        UserError: no stock scheduler samples such a student.
    """
    source = schedulers.source_of(teacher)
    return schedulers.form(source, student.steps, student.start, student.renoise)


def shared_weights(recipe: Recipe, names: Sequence[str]) -> dict[str, Adapter]:
    """The adapter of each network that is one on the teacher's weights, and not a copy of them.

    Args:
        names: The objective's networks beside teacher, student and critic.
    """
    section = recipe.adapters
    if section is None or not recipe.kind.few_step:
        return {}
    shared = ("student", *names) if section.players is None else section.players
    return dict.fromkeys(shared, section.adapter)


def critic_of(section: CriticSection, fake: Any, teacher: Teacher) -> Critic:
    """A critic on the fake score's features.

    Raises:
        UserError: a block is not there, or has no features that a critic reads.
    """
    cond = teacher.codec.condition([0])
    try:
        blocks = (unwrap(fake).middle,) if section.blocks is None else section.blocks
        return Critic(fake, teacher.shape, cond, blocks)
    except ValueError as error:
        raise UserError(f"critic.blocks: {error}") from None


def check_exact(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse what the linear student of a closed-form Gaussian teacher does not have.

    Raises:
        UserError: naming the section.
    """
    where, names = f"teacher {teacher.source!r}", networks_of(recipe.kind)
    if "fake" not in names:
        raise UserError(
            f"{where}: objective.name: {recipe.objective['name']} trains at many times, and its "
            "students are linear and have one; use an objective with a fake score, such as dmd2 "
            "or sid"
        )
    for section, given in (("adapters", recipe.adapters), ("critic", recipe.critic)):
        if given is not None:
            raise UserError(f"{where}: {section}: its students are linear; remove the section")
    if recipe.student.steps != 1:
        raise UserError(f"{where}: student.steps: its students are linear; set it to 1")
    if recipe.train.sample_every:
        raise UserError(f"{where}: train.sample_every: it has no pictures to show; set it to 0")


def backbones(networks: dict[str, nn.Module]) -> list[nn.Module]:
    """The distinct backbones in a set of networks: adapters share one."""
    found = []
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, Adapted | Network):
                found.append(unwrap(module).backbone)
    return list(dict.fromkeys(found))


def player_networks(objective: Objective) -> dict[str, nn.Module]:
    """The networks that learn, by field: all but the teacher and those that are None."""
    names = [n for n in networks_of(type(objective)) if n != "teacher"]
    return {n: v for n in names if (v := getattr(objective, n)) is not None}
