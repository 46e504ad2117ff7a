"""A smaller network of a teacher: which layers go, what that costs, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from distill.sampling.student_sampler import timed
from students.architecture import score
from students.architecture.units import check_units, size_of
from students.export.folder import prompts_of
from students.schedulers import source_of
from teachers import conditions
from teachers.errors import UserError, clipped, plural
from teachers.teacher import Teacher

SAMPLES = 64  # of the teacher, that costs are measured on
TIMED = 5  # calls that a time is the median of


@dataclass(frozen=True)
class Size:
    """What a network weighs and takes.

    flops: Of one sample through it.
    seconds: Of a call, by its batch, on this machine.
    """

    weights: int
    flops: float
    seconds: dict[int, float]


@dataclass(frozen=True)
class Compressed:
    """A smaller network that was made.

    scores: Of every unit; empty where none was measured.
    cost: E|F - F'|² of the whole choice, before any training; None where none was measured.
    """

    scores: list[score.Unit]
    removed: list[str]
    config: dict[str, Any]
    cost: float | None
    before: Size
    after: Size


def compress(
    teacher: Teacher,
    folder: Path,
    keep: float | None = None,
    remove: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    prompts: Sequence[Any] = (),
    seed: int = 0,
    change: Mapping[str, Any] | None = None,
) -> Compressed:
    """Write a pipeline like the teacher's with a smaller network to `folder`.

    Args:
        keep: The share of the weights that stays at most: the cheapest layers go.
        remove: The layers that go, by name, in place of `keep`.
        config: Settings of the network's config that become others.
        prompts: That the teacher is sampled for, to measure costs; by default labels in turn, or
            two prompts of any teacher's.
        seed: Of the samples and of the noise.
        change: Layers that keep some of their heads or neurons; no unit is scored then.

    Raises:
        UserError: there are no such layers or settings, or the teacher is no folder of a pipeline.
    """
    network = source_of(teacher)
    names = list(prompts) or prompts_of(teacher)
    if classes := teacher.codec.classes:
        names = list(prompts) or [*range(classes)]
    states = score.calibration(teacher, [names[i % len(names)] for i in range(SAMPLES)], seed)
    check_units(network.backbone, remove, "--remove")
    scores, gone = [] if change else score.scored(teacher, states), [*remove]
    if keep is not None:
        gone = score.chosen(scores, size_of(network.backbone), keep)
    cost = score.cost_without(network, gone, states) if gone and not (config or change) else None
    about = {
        "teacher": teacher.source, "keep": keep, "remove": gone, "config": dict(config or {}),
        "change": dict(change or {}), "cost": cost, "units": [asdict(u) for u in scores],
        "seed": seed,
    }  # fmt: skip
    made = score.save(teacher, folder, dict(config or {}), gone, about, change)
    twin = network.twin(made.to(next(network.parameters()).device).eval(), network.schedule)
    sizes = [size(teacher, v) for v in (network, twin)]
    return Compressed(scores, gone, dict(config or {}), cost, *sizes)


@torch.no_grad()
def size(teacher: Teacher, network: Any, batches: Sequence[int] = (1, 16)) -> Size:
    """What a network of the teacher's family weighs and takes on this machine."""
    device = next(network.parameters()).device
    prompts = prompts_of(teacher)
    seconds, flops = {}, 0.0
    for n in batches:
        x = torch.randn(n, *teacher.shape, device=device)
        t = torch.full((n,), 0.5, device=device)
        cond = conditions.moved(
            teacher.codec.condition([prompts[i % len(prompts)] for i in range(n)]), device
        )
        if not flops:
            with FlopCounterMode(display=False) as counter:
                network(x, t, cond)
            flops = counter.get_total_flops() / n
        seconds[n] = median(timed(partial(network, x, t, cond), device)[1] for _ in range(TIMED))
    return Size(size_of(network.backbone), flops, seconds)


def tables(made: Compressed) -> list[Table]:
    """The layers that could go with what each costs, if measured; the network before and after."""
    units = Table("layer that can go", "weights", "cost", "", box=None, header_style="bold")
    for u in made.scores:
        units.add_row(u.name, f"{u.weights:,}", f"{u.cost:.4f}", "goes" * (u.name in made.removed))
    sizes = Table("network", "weights", "work", box=None, header_style="bold")
    for n in made.before.seconds:
        sizes.add_column(f"batch {n}")
    for name, of in (("teacher", made.before), ("made", made.after)):
        times = [f"{v * 1e3:.1f} ms" for v in of.seconds.values()]
        sizes.add_row(name, f"{of.weights:,}", f"{of.flops / 1e6:,.1f} MFLOP", *times)
    first, then = made.before, made.after
    shares = [f"{then.seconds[n] / first.seconds[n]:.0%}" for n in first.seconds]
    sizes.add_row("", f"{then.weights / first.weights:.0%}", f"{then.flops / first.flops:.0%}",
                  *shares)  # fmt: skip
    return [units, sizes] if made.scores else [sizes]


def check_request(keep: float | None, remove: Sequence[str], config: Mapping[str, Any]) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: naming the option.
    """
    if keep is not None and remove:
        raise UserError("--remove: --keep chooses the layers; leave one of the two out")
    if keep is None and not remove and not config:
        raise UserError("--keep: give a share of the weights, such as 0.7, or --remove or --config")
    if keep is not None and not 0 < keep < 1:
        raise UserError(f"--keep {keep:g}: give a share of the weights between 0 and 1")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "it is a file" if not folder.is_dir() else "it is not empty"
        raise UserError(f"--out {clipped(str(folder))}: {what}; name a new folder")


def summary(made: Compressed, folder: Path) -> str:
    """What was made, in two lines."""
    gone = len(made.removed)
    count = f"without {gone} {plural(gone, 'layer')}" if gone else "with narrower layers"
    error = "" if made.cost is None else f", its output moved by {made.cost:.4f}"
    return (
        f"{folder}: {made.after.weights / made.before.weights:.0%} of the weights, {count}{error}\n"
        f"student.init: {folder} starts a student from it"
    )
