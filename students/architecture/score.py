"""What each unit of a teacher's network is worth, and the smaller network without the cheap ones.

LAPTOP-Diff, Zhang et al. 2024 (arXiv:2404.11098): a unit's cost is how far the network's output
moves where the unit is skipped, costs are taken to add up, and the cheapest set of a given size is
a knapsack's. They add up as a ranking and not as a number: units that stand in for each other look
cheaper alone than they are together, so the cost of the whole choice is measured as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from students.architecture.change import Change, changed
from students.architecture.knapsack import cheapest
from students.architecture.units import size_of, skipping, units
from students.schedulers import source_of
from teachers import conditions
from teachers.catalogue.loading import find
from teachers.denoiser import Cond
from teachers.errors import UserError, clipped
from teachers.families.base import Pretrained, quiet
from teachers.reduced.source import CLASSES
from teachers.reduced.source import write as write_source
from teachers.solver import solve
from teachers.teacher import EMBEDDED, Teacher

COMPRESSED = "compressed.json"  # in the folder of a smaller network: how it was made
LEVELS = 8  # noise levels, evenly spaced in time, that costs are averaged over


@dataclass(frozen=True)
class Unit:
    """A layer that can go.

    weights: How many it has.
    cost: E|F - F'|² over dimensions, of the network's own output without it, in the units in which
        the teacher's training loss is.
    """

    name: str
    weights: int
    cost: float


@dataclass(frozen=True)
class Calibration:
    """States that costs are measured at: x_t (N, ...), t (N,) and conditions."""

    x_t: Tensor
    t: Tensor
    cond: Cond


@torch.no_grad()
def calibration(teacher: Teacher, prompts: Sequence[Any], seed: int = 0) -> Calibration:
    """States of the teacher's own samples, one for each prompt and each of `LEVELS` noise levels.

    The samples are drawn in 16 DDIM steps without guidance.
    """
    network, device = source_of(teacher), next(teacher.denoiser.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(len(prompts), *teacher.shape, generator=rng).to(device)
    cond = conditions.moved(teacher.codec.condition([*prompts]), device)
    x = torch.cat([
        solve(network, part, 16, "ddim", conditions.rows(cond, slice(i, i + len(part))))
        for i, part in zip(range(0, len(z), 64), z.split(64), strict=False)
    ])  # fmt: skip
    x, cond = torch.cat([x] * LEVELS), conditions.joined(*[cond] * LEVELS)
    places = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    t = places.repeat_interleave(len(z)).to(device, torch.float32)
    noise = torch.randn(x.shape, generator=rng).to(device)
    return Calibration(network.process.noise(x, t, noise), t, cond)


@torch.no_grad()
def cost_without(
    network: Pretrained, names: Iterable[str], states: Calibration, whole: Tensor | None = None
) -> float:
    """How far the network's output moves without some of its units, as `Unit.cost` says.

    Args:
        whole: Its `outputs` with all of them, if they are known.
    """
    with skipping(network.backbone, names):
        moved = outputs(network, states)
    error = (
        (moved - (outputs(network, states) if whole is None else whole)).square().flatten(1).mean(1)
    )
    return (network.weight(states.t) * error).mean().item()


@torch.no_grad()
def outputs(network: Pretrained, states: Calibration, batch: int = 64) -> Tensor:
    """x̂ (N, ...) at the states."""
    parts = []
    for i in range(0, len(states.t), batch):
        rows = slice(i, i + batch)
        cond = conditions.rows(states.cond, rows)
        parts.append(network(states.x_t[rows], states.t[rows], cond))
    return torch.cat(parts)


def scored(teacher: Teacher, states: Calibration) -> list[Unit]:
    """Every unit of the teacher's network with its cost, in the network's order.

    Raises:
        UserError: the network has no units.
    """
    network = source_of(teacher)
    found = units(network.backbone)
    if not found:
        raise UserError(
            f"teacher {clipped(teacher.source)!r}: a {type(network.backbone).__name__} has no "
            "layers that can go; give settings of its config"
        )
    whole = outputs(network, states)
    return [
        Unit(name, size_of(module), cost_without(network, [name], states, whole))
        for name, module in found.items()
    ]


def chosen(
    scores: Sequence[Unit],
    total: int,
    keep: float,
    saves: Mapping[str, int] | None = None,
    repeated: Sequence[str] = (),
    pick: Callable[[Mapping[str, float], Mapping[str, int], int], list[str]] = cheapest,
) -> list[str]:
    """The units to remove so that at most a share `keep` of the whole network stays.

    Args:
        total: The whole network, in what `saves` counts.
        saves: What removing each unit saves; by default weights.
        repeated: Units that run twice: they stay, and their copies count as part of the network.
        pick: The units, of their costs and savings, that save at least so much.

    Raises:
        UserError: its units are not as much of it.
    """
    saves = saves or {u.name: u.weights for u in scores}
    cost = {u.name: u.cost for u in scores if u.name not in repeated}
    size = {name: saves[name] for name in cost}
    added = sum(saves[name] for name in repeated)
    try:
        return pick(cost, size, total + added - int(keep * total))
    except ValueError:
        share = 1 + (added - sum(size.values())) / total
        raise UserError(
            f"--keep {keep:g}: without any of its layers that can go, {share:.2f} of the weights "
            "stay, or of what else --by counts; give more, or settings of the network's config"
        ) from None


def evolved(
    network: Pretrained,
    states: Calibration,
    cost: Mapping[str, float],
    saves: Mapping[str, int],
    least: int,
) -> list[str]:
    """The units to remove, one by one, until they save `least`: SnapFusion's rule.

    Each time the unit goes that costs least for what it saves (arXiv:2306.00980, section 3.1),
    measured without those that went before.

    Args:
        cost, saves: Of each unit that can go: what it costs alone, and what it saves.

    Raises:
        ValueError: all of them together save less.
    """
    if sum(saves.values()) < least:
        raise ValueError("the units together are smaller")
    gone, more, whole = list[str](), dict(cost), outputs(network, states)
    while least > 0:
        gone.append(lowest(more, saves))
        least -= saves[gone[-1]]
        if least > 0:
            before = cost_without(network, gone, states, whole)
            left = [n for n in saves if n not in gone]
            more = {n: cost_without(network, [*gone, n], states, whole) - before for n in left}
    return gone


def lowest(cost: Mapping[str, float], saves: Mapping[str, int]) -> str:
    """The unit that costs least for what it saves."""
    return min(cost, key=lambda name: cost[name] / max(1, saves[name]))


def highest(scores: Sequence[Unit], saves: Mapping[str, int], count: int) -> list[str]:
    """The units that cost most for what removing them would save: what is worth repeating."""
    worth = {u.name: u.cost / max(1, saves[u.name]) for u in scores}
    return sorted(worth, key=lambda name: -worth[name])[:count]


def save(
    teacher: Teacher,
    folder: Path,
    config: dict[str, Any],
    remove: Sequence[str],
    about: Any,
    change: Mapping[str, Change] | None = None,
) -> Any:
    """Write a pipeline like the teacher's whose network is the smaller one; that network.

    All other parts are copies of the teacher's files.

    Args:
        config, remove, change: As `change.changed` has them.
        about: Plain data of how it was made, which `compressed.json` takes up.

    Raises:
        UserError: the teacher is no folder of a pipeline, or the weights do not make such a
            network.
    """
    network = source_of(teacher)
    made: Any = changed(network.backbone, config, {}, remove, change=change)
    part = network.PART
    where = folder_of(teacher.source, f"{part}/config.json")
    shutil.copytree(where, folder, ignore=shutil.ignore_patterns(part, "*.md"), dirs_exist_ok=True)
    with quiet():
        made.save_pretrained(folder / part)
    if isinstance(made, CLASSES):
        write_source(folder, part, made)
    (folder / COMPRESSED).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return made


def folder_of(source: str, file: str = "model_index.json") -> Path:
    """The folder of a teacher's pipeline, which smaller ones are copies of.

    Raises:
        UserError: the teacher is none: there is no such file in it.
    """
    where = EMBEDDED.get(source) or find(source)
    if not (where / file).is_file():
        raise UserError(
            f"teacher {clipped(source)!r}: it is no folder of a diffusers pipeline with a {file}; "
            "give one that has it, such as a student's"
        )
    return where
