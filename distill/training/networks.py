"""The networks of an objective: the student, and what else its fields name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from distill.config.recipe import Recipe, networks_of
from distill.objectives.base import Objective
from distill.sampling.guided_teacher import guided
from students import gaussian, schedulers
from students.critic import Critic
from students.generator import Generator
from students.lora import Adapted, adapted, checkpointing, to_float32, unwrap
from teachers.denoiser import Network
from teachers.errors import UserError
from teachers.teacher import Teacher


def objective_of(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The objective with its networks: a student, and what else its fields name."""
    kind = recipe.kind
    adapters = recipe.adapters
    if kind.few_step and gaussian.exact(teacher):
        return exact_objective(recipe, teacher, device)
    names = [n for n in networks_of(kind) if n not in ("teacher", "student", "critic")]
    shared: tuple[str, ...] = ()
    if adapters and kind.few_step:
        shared = ("student", *names) if adapters.players is None else adapters.players
    # copies first: once there are adapters on the teacher's weights, a copy would hold them as well
    networks: dict[str, nn.Module] = {
        n: to_float32(deepcopy(teacher.denoiser)).requires_grad_(True)
        for n in names
        if n not in shared
    }
    if kind.few_step:
        s = recipe.student
        adapter = adapters.adapter if adapters and "student" in shared else None
        student = schedulers.student(teacher, s.steps, s.start, s.renoise, adapter)
        trained = s.trained(kind.learns, student.counts)
        networks["student"] = student.keep(*trained, weights=list(trained.values()))
    else:
        networks["student"] = Generator(deepcopy(teacher.denoiser).requires_grad_(True))
    for name in [n for n in names if n in shared]:
        assert adapters is not None
        networks[name] = adapted(teacher, adapters.adapter, name)
    networks["teacher"] = guided(recipe, teacher)
    if recipe.critic is not None:
        fake: Any = networks["fake"]
        cond = teacher.codec.condition([0])
        named = recipe.critic.blocks
        blocks = (unwrap(fake).middle,) if named is None else named
        networks["critic"] = Critic(fake, teacher.shape, cond, blocks)
    if recipe.train.checkpointing:
        for backbone in backbones(networks):
            checkpointing(backbone)
    return assembled(recipe, networks, device)


def check_exact(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse what the linear student of a closed-form Gaussian has not.

    Raises:
        UserError: naming the section.
    """
    where, names = f"teacher {teacher.source!r}", networks_of(recipe.kind)
    if "fake" not in names:
        raise UserError(
            f"{where}: objective.name: {recipe.objective['name']} trains at many times, and its "
            "students are linear and of one; use one with a fake score, such as dmd2 or sid"
        )
    for section, given in (("adapters", recipe.adapters), ("critic", recipe.critic)):
        if given is not None:
            raise UserError(f"{where}: {section}: its students are linear; remove the section")
    if recipe.student.steps != 1:
        raise UserError(f"{where}: student.steps: its students are linear and take 1")
    if recipe.train.sample_every:
        raise UserError(f"{where}: train.sample_every: it has no pictures to show; set it to 0")


def exact_objective(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The objective of a closed-form Gaussian teacher: a linear student, fake scores as exact."""
    names = networks_of(recipe.kind)
    networks: dict[str, nn.Module] = {
        n: gaussian.score(teacher) for n in names if n not in ("teacher", "student", "critic")
    }
    networks |= {"student": gaussian.student(teacher), "teacher": guided(recipe, teacher)}
    return assembled(recipe, networks, device)


def assembled(recipe: Recipe, networks: dict[str, nn.Module], device: torch.device) -> Objective:
    """The recipe's objective with its networks, all on the device and in eval mode."""
    for network in networks.values():
        network.to(device).eval()  # dropout would differ between teacher, fake and student
    keys = {k: v for k, v in recipe.objective.items() if k != "name"}
    schema = recipe.keys_schema().model_validate(keys)
    return recipe.kind(**networks, **{k: getattr(schema, k) for k in keys})  # pyright: ignore


def backbones(networks: dict[str, nn.Module]) -> list[nn.Module]:
    """The distinct backbones under a set of networks: adapters share one."""
    found = []
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, Adapted | Network):
                found.append(unwrap(module).backbone)
    return list(dict.fromkeys(found))


def player_networks(objective: Objective) -> dict[str, nn.Module]:
    """The networks that move: all of an objective's, but for the teacher and absent ones."""
    names = [n for n in networks_of(type(objective)) if n != "teacher"]
    return {n: v for n in names if (v := getattr(objective, n)) is not None}
