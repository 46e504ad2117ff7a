"""A smaller network of a teacher: which layers go, what that costs, and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.sampling.student_sampler import timed
from students.architecture import score
from students.architecture.knapsack import cheapest
from students.architecture.units import check_units, size_of, skipping, units
from students.export.folder import prompts_of
from students.schedulers import source_of
from teachers import conditions
from teachers.errors import UserError, clipped, plural
from teachers.features import replaced
from teachers.teacher import Teacher

SAMPLES = 64  # of the teacher, that costs are measured on
TIMED = 5  # calls that a time is the median of
By = Literal["weights", "work", "time"]  # what a share of a network is of


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
    repeated: list[str] = field(default_factory=list)


def compress(
    teacher: Teacher,
    folder: Path,
    keep: float | None = None,
    remove: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    prompts: Sequence[Any] = (),
    seed: int = 0,
    change: Mapping[str, Any] | None = None,
    by: By = "weights",
    evolve: bool = False,
    repeat: int = 0,
) -> Compressed:
    """Write a pipeline like the teacher's with a smaller network to `folder`.

    Args:
        keep: The share of the network that stays at most: the cheapest layers go.
        remove: The layers that go, by name, in place of `keep`.
        config: Settings of the network's config that become others.
        prompts: That the teacher is sampled for, to measure costs; by default labels in turn, or
            two prompts of any teacher's.
        seed: Of the samples and of the noise.
        change: Layers that keep some of their heads or neurons; no unit is scored then.
        by: What `keep` is a share of.
        evolve: Choose the layers one by one, each measured without those before.
        repeat: How many layers run twice: those that cost most for what they take.

    Raises:
        UserError: there are no such layers or settings, or the teacher is no folder of a pipeline.
    """
    network = source_of(teacher)
    states, config, change = (
        states_of(teacher, prompts, seed),
        {**(config or {})},
        {**(change or {})},
    )
    check_units(network.backbone, remove, "--remove")
    scores, gone = [] if change else score.scored(teacher, states), [*remove]
    total, saves = savings(teacher, scores, by)
    again = score.highest(scores, saves, repeat)
    if keep is not None:
        pick = partial(score.evolved, network, states) if evolve else cheapest
        gone = score.chosen(scores, total, keep, saves, again, pick)
    forms = {**change, **{name: {"kind": "repeat"} for name in again}}
    cost = score.cost_without(network, gone, states) if gone and not (config or change) else None
    about = {
        "teacher": teacher.source, "keep": keep, "remove": gone, "config": config,
        "change": change, "cost": cost, "units": [asdict(u) for u in scores],
        "seed": seed, "by": by, "evolve": evolve, "repeat": again, "saves": saves,
    }  # fmt: skip
    made = score.save(teacher, folder, config, gone, about, forms)
    twin = network.twin(made.to(next(network.parameters()).device).eval(), network.schedule)
    before, after = (size(teacher, v) for v in (network, twin))
    return Compressed(scores, gone, config, cost, before, after, again)


def states_of(teacher: Teacher, prompts: Sequence[Any], seed: int) -> score.Calibration:
    """The states that costs are measured at, as `compress` has the arguments."""
    names = [*prompts] or [*range(teacher.codec.classes or 0)] or prompts_of(teacher)
    return score.calibration(teacher, [names[i % len(names)] for i in range(SAMPLES)], seed)


@torch.no_grad()
def savings(teacher: Teacher, scores: Sequence[score.Unit], by: By) -> tuple[int, dict[str, int]]:
    """The whole network, and each unit, in what `by` counts: weights, operations or nanoseconds.

    Work and time are of a call of one sample, in which `TIMED` calls give each time's median.
    """
    network = source_of(teacher)
    if by == "weights":
        return size_of(network.backbone), {u.name: u.weights for u in scores}
    device = next(network.parameters()).device
    x, t = torch.randn(1, *teacher.shape, device=device), torch.full((1,), 0.5, device=device)
    cond = conditions.moved(teacher.codec.condition(prompts_of(teacher)[:1]), device)
    call, modules = partial(network, x, t, cond), units(network.backbone)
    if by == "work":
        whole = operations(call)
        counts = dict.fromkeys([u.name for u in scores], 0)
        for name in counts:
            with skipping(network.backbone, [name]):
                counts[name] = whole - operations(call)
        return whole, counts
    taken: dict[str, list[float]] = {u.name: [] for u in scores}
    with ExitStack() as stack:
        for name, found in taken.items():
            stack.enter_context(timing(modules[name], found, device))
        whole = median(timed(call, device)[1] for _ in range(TIMED))
    return round(whole * 1e9), {n: round(median(v) * 1e9) for n, v in taken.items()}


def operations(call: Callable[[], Any]) -> int:
    """How many floating-point operations a call is."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@contextmanager
def timing(module: nn.Module, found: list[float], device: torch.device) -> Iterator[None]:
    """Within it, the seconds of each of the module's calls are added to `found`."""
    forward = module.forward

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        timed(tuple, device)  # what the device has before it is not this module's
        out, seconds = timed(partial(forward, *args, **kwargs), device)
        found.append(seconds)
        return out

    with replaced(module, timed_forward):
        yield


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
            flops = operations(partial(network, x, t, cond)) / n
        seconds[n] = median(timed(partial(network, x, t, cond), device)[1] for _ in range(TIMED))
    return Size(size_of(network.backbone), flops, seconds)


def tables(made: Compressed) -> list[Table]:
    """The layers that could go with what each costs, if measured; the network before and after."""
    rows = Table("layer that can go", "weights", "cost", "", box=None, header_style="bold")
    for u in made.scores:
        fate = "goes" * (u.name in made.removed) + "runs twice" * (u.name in made.repeated)
        rows.add_row(u.name, f"{u.weights:,}", f"{u.cost:.4f}", fate)
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
    return [rows, sizes] if made.scores else [sizes]


def check_request(
    keep: float | None,
    remove: Sequence[str],
    config: Mapping[str, Any],
    by: By = "weights",
    evolve: bool = False,
    repeat: int = 0,
) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: naming the option.
    """
    check_choice(keep, by, evolve, repeat, [remove, config])
    if keep is not None and remove:
        raise UserError("--remove: --keep chooses the layers; leave one of the two out")
    if keep is None and not remove and not config and not repeat:
        raise UserError("--keep: give a share of the weights, such as 0.7, or --remove or --config")
    if keep is not None and not 0 < keep < 1:
        raise UserError(f"--keep {keep:g}: give a share of the weights between 0 and 1")


def check_choice(
    keep: float | None, by: str, evolve: bool, repeat: int, others: Sequence[Any]
) -> None:
    """Refuse options of the choice of layers that do not go together, or with `others`.

    Raises:
        UserError: naming the option.
    """
    if by not in get_args(By):
        raise UserError(f"--by {clipped(by)}: give {', '.join(get_args(By))}")
    if keep is None and (evolve or (by != "weights" and not repeat)):
        option = "--evolve" if evolve else "--by"
        raise UserError(f"{option}: it says how --keep chooses; give a share that stays")
    if repeat and any(others):
        raise UserError("--repeat: it goes with --keep, or alone; leave the other options out")


def lines_of(file: Path | None) -> list[str]:
    """The prompts in a file, one on each line; none without a file.

    Raises:
        UserError: it cannot be read, or has none.
    """
    if file is None:
        return []
    try:
        lines = [v.strip() for v in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: it cannot be read ({error})") from None
    if not (found := [v for v in lines if v]):
        raise UserError(f"--prompts {file}: it has no line; give a prompt on each")
    return found


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
