"""Compiles the networks of a run, as `train.compile` says."""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from distill.config.recipe import Recipe
from distill.console import print_notice
from distill.data.stream import Source
from distill.objectives.base import Batch, Objective, networks_in
from distill.training.engine import first_batch
from distill.training.player import Player
from students.generator import Generator
from students.lora import AdaptedDenoiser, network_of
from students.two_time import NumberReading
from teachers import conditions
from teachers.compiled import (
    Mode,
    blocks_in,
    compile_errors,
    compile_modules,
    listed_blocks,
    running_compiled,
    why_not_compiled,
)
from teachers.denoiser import Network
from teachers.errors import UserError, plural
from teachers.guidance import SkipLayerGuided

# Steps from which compilation pays: on an H200 it took EDM's CIFAR-10 network 179 s at first, and a
# step of DMD2 0.175 s and not 0.26 s from then on.
PAYS = 2000


def wanted_mode(recipe: Recipe, device: torch.device) -> Mode:
    """How a machine that can compile does: `train.compile`, or the default on this device."""
    mode, short = recipe.train.compile, recipe.train.steps < PAYS
    if mode is None:
        return "off" if device.type == "cpu" or short else "blocks"
    return mode


def mode_of(recipe: Recipe, device: torch.device) -> Mode:
    """How to compile: the recipe's `train.compile`, or the default on this device.

    By default a GPU compiles the blocks of runs that are long enough to win back what it takes. A
    default that this machine cannot carry out is off, with one line.

    Raises:
        UserError: the recipe asks for compilation, and this machine cannot compile.
    """
    mode = recipe.train.compile
    if (wanted := wanted_mode(recipe, device)) == "off":
        return "off"
    reason = why_not_compiled(device)
    if reason is None:
        return wanted
    if mode is None:
        print_notice(f"train.compile: off, since this machine cannot compile: {reason}")
        return "off"
    raise UserError(f"train.compile: this machine cannot compile: {reason}; set it to off")


def compile_run(
    recipe: Recipe,
    objective: Objective,
    player: Player,
    source: Source,
    accelerator: Accelerator,
    mode: Mode,
) -> None:
    """Compile an objective's networks, and call its student so that all its graphs are made.

    Args:
        player: The student's, or of an objective that trains no student, another.
    """
    if mode != "off":
        compile_networks(recipe, networks_in(objective), mode)
        batch = first_batch(source, recipe.train, accelerator)
        compile_chains(objective.student, player, batch, accelerator)


def compile_networks(
    recipe: Recipe, networks: dict[str, nn.Module], mode: Literal["blocks", "full"]
) -> None:
    """Compile the backbones in a set of networks, in place.

    Whole networks are compiled only where nothing reads, changes or recomputes the modules inside
    them; otherwise one line says so, and their blocks are compiled.

    Args:
        networks: The objective's, on their device.
    """
    if mode == "full" and (reason := needs_blocks(recipe, networks)):
        print_notice(f"train.compile: blocks and not full, since {reason}")
        mode = "blocks"
    dynamic = None if recipe.data.buckets is not None else False
    count = 0
    for network in pretrained_in(networks):
        modules = [network.backbone]
        if mode == "blocks":
            modules = blocks_of(network) or modules
        count += compile_modules(modules, dynamic)
    if not count:
        print_notice("train.compile: off, since no network here has a module to compile")
        return
    print_notice(f"compiling {count} {plural(count, 'module')}: the first step takes minutes")


def blocks_of(network: Network) -> list[nn.Module]:
    """What is compiled one by one: a family's blocks, or the items of an own network's lists."""
    pattern = getattr(network, "BLOCKS", None)
    if pattern is None:
        return listed_blocks(network.backbone)
    return blocks_in(network.backbone, pattern)


def needs_blocks(recipe: Recipe, networks: dict[str, nn.Module]) -> str | None:
    """What needs the modules inside the networks to run as modules; None if nothing does."""
    modules = [m for network in networks.values() for m in network.modules()]
    reasons = {
        "train.checkpointing recomputes blocks": recipe.train.checkpointing,
        "the critic reads a block's output": recipe.critic is not None,
        "the discriminator reads a block's output": recipe.teacher.discriminator is not None,
        "skip-layer guidance skips blocks": any(isinstance(m, SkipLayerGuided) for m in modules),
        "a landing time or a guidance scale is added inside the network": any(
            isinstance(m, NumberReading) for m in modules
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def pretrained_in(networks: dict[str, nn.Module]) -> list[Network]:
    """The networks with a backbone, one for each backbone: adapters share one."""
    found: dict[nn.Module, Network] = {}
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, AdaptedDenoiser | Network):
                inner = network_of(module) if isinstance(module, AdaptedDenoiser) else module
                found.setdefault(inner.backbone, inner)
    return list(found.values())


@torch.no_grad()
def compile_chains(
    student: Generator, player: Player, batch: Batch, accelerator: Accelerator
) -> None:
    """Call the student as the earlier steps of a training chain do, so that this is compiled now.

    Which chain is trained is drawn at random, and a chain of two steps may first be drawn after
    hours. In the student's turn and in the others' turns it is another graph, as the weights that
    require gradients differ, and so it is for a single sample.

    Args:
        batch: Any, on the device; two samples of it are used.
    """
    chains = [student.at(count) for count in student.counts]
    size = len(batch.noise)
    left = {n for c in chains for k in range(len(c.times)) for n in c.remaining(size, k)[:-1]}
    with compile_errors(), running_compiled(), accelerator.autocast():
        for n in sorted({min(n, 2) for n in left if n}):
            for learns in (False, True):
                player.requires_grad_(learns)
                student.step(batch.noise[:n], 0, conditions.rows(batch.cond, slice(None, n)))
    player.requires_grad_(False)
