"""Few-step students of a network of the user's own: what is asked of it, and how they are made.

No stock scheduler samples them, so their times are the process's own, in equal steps of t.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from students.generator import Generator, Renoise, divisor_grids
from students.lora import (
    AdaptedDenoiser,
    Adapter,
    config_by_layers,
    innermost,
    network_of,
    to_float32,
    view_of,
)
from teachers import conditions
from teachers.denoiser import Cond, Denoiser, Network, without_variance
from teachers.errors import UserError, clipped, first_line, teacher_at
from teachers.families.base import Pretrained
from teachers.process import Process
from teachers.teacher import Teacher

PROMPTS = ("a red circle", "two boats on a lake")  # where checks need some, and there are no labels
WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel")  # of torch
MIDDLES = ("mid_block", "middle_block", "middle", "mid", "bottleneck")  # usual names of a block


def is_own(denoiser: Denoiser) -> bool:
    """Whether the network is the user's own: not a pipeline's, and not a closed form."""
    network = innermost(denoiser)
    return isinstance(network, Network) and not isinstance(network, Pretrained)


class Arguments(NamedTuple):
    """How a backbone is built: its class's arguments, and which of them are tuples."""

    values: dict[str, Any]
    tuples: list[str]


# ---- what is asked of a teacher, before any work


def check(teacher: Teacher) -> None:
    """Refuse a teacher from which no student can be trained or exported.

    Raises:
        UserError: its network has no weights, some outside its backbone, or an output of another
            shape; its conditions are no tensors of a row for each sample; or its class could not be
            built again from what is known of it.
    """
    who, network = teacher_at(teacher.source), network_of(teacher.denoiser)
    if (kind := type(network.backbone).__name__) in WRAPPERS:
        raise UserError(
            f"{who}: its backbone is a {kind}; give Network the network inside, without it "
            "(train.compile compiles, and accelerate launch uses several GPUs)"
        )
    inside = {id(p) for p in network.backbone.parameters()}
    if not inside:
        raise UserError(
            f"{who}: its network has no parameters, so there is nothing to train; give Network a "
            "backbone with weights"
        )
    if outside := [n for n, p in network.named_parameters() if id(p) not in inside]:
        raise UserError(
            f"{who}: its weight {outside[0]} is not in the backbone, which alone is exported; move "
            "it there"
        )
    if odd := [n for n, p in network.named_parameters() if p.is_complex()]:
        raise UserError(
            f"{who}: its weight {odd[0]} is complex, and averages of weights are real; keep it as "
            "real numbers, and let forward make torch.view_as_complex of them"
        )
    if type(network).forward is not Network.forward:
        raise UserError(
            f"{who}: {type(network).__name__} defines forward, by which no sampler could read its "
            "output; define call alone, and give Network what it predicts"
        )
    check_output(teacher, who)
    arguments_of(network.backbone, who)


@torch.no_grad()
def check_output(teacher: Teacher, who: str) -> None:
    """Call the network on two samples, and on one of them alone.

    Raises:
        UserError: it raises an exception, its output has not the shape of x_t, or it is no function
            of each sample's own x_t, t and condition whose gradient reaches the weights.
    """
    network = network_of(teacher.denoiser)
    device = next(network.backbone.parameters()).device
    cond = conditions.moved(example_condition(teacher, 2), device)
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    x_t = noise.to(device)
    t, s = x_t.new_full((2,), 0.5), x_t.new_zeros(2)
    given = x_t.clone(), t.clone()
    out = called(network, *given, cond, s, who)
    for name, before, after in zip(("x_t", "t"), (x_t, t), given, strict=True):
        if not torch.equal(before, after):
            raise UserError(
                f"{who}: its network writes into {name}, which other networks read after it; let "
                "call make a new tensor (x = x * 2, not x.mul_(2))"
            )
    if not close(out, called(network, x_t.clone(), t.clone(), cond, s, who)):
        raise UserError(
            f"{who}: its network gives two outputs for one input; remove what is random in it, or "
            "what it counts from call to call"
        )
    first = conditions.rows(cond, slice(0, 1))
    if not close(out[:1], called(network, x_t[:1].clone(), t[:1].clone(), first, s[:1], who)):
        raise UserError(
            f"{who}: its network's output for a sample depends on the other samples of its batch; "
            "let it treat each by itself"
        )
    frozen = [p for p in network.backbone.parameters() if not p.requires_grad]
    try:
        with torch.enable_grad():
            network.backbone.requires_grad_(True)
            learns = called(network, x_t[:1], t[:1], first, s[:1], who).requires_grad
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if not learns:
        raise UserError(
            f"{who}: no gradient of its network's output reaches its weights; let it compute "
            "without no_grad and detach"
        )


@torch.no_grad()
def reads_time(teacher: Teacher) -> bool:
    """Whether the network's output for two samples depends on the time."""
    network = network_of(teacher.denoiser)
    device = next(network.backbone.parameters()).device
    cond = conditions.moved(example_condition(teacher, 2), device)
    x_t = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0)).to(device)
    early, late = (
        network.call(x_t.clone(), x_t.new_full((2,), t), cond, x_t.new_zeros(2)) for t in (0.1, 0.9)
    )
    return not torch.equal(early, late)


def called(network: Network, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor, who: str) -> Tensor:
    """The network's output.

    Raises:
        UserError: it raises an exception, or returns something of another shape than x_t.
    """
    try:
        out = network.call(x_t, t, cond, s)
    except Exception as error:  # a user's own code may raise anything
        raise UserError(
            f"{who}: its network raised {type(error).__name__}: "
            f"{clipped(first_line(error), 150)} for x_t {shape_of(x_t)}; correct its call, or "
            "Teacher's shape"
        ) from None
    if not isinstance(out, Tensor) or without_variance(out, x_t).shape != x_t.shape:
        got = shape_of(out) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"{who}: for x_t {shape_of(x_t)} its network returns {got}; return a tensor shaped "
            "like x_t"
        )
    return out


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by rounding at most; NaN equals NaN."""
    return torch.allclose(a.float(), b.float(), 1e-2, 1e-2, equal_nan=True)


def shape_of(x: Tensor) -> str:
    """A tensor's shape in words, such as 2×1×64."""
    return "×".join(map(str, x.shape))


def example_condition(teacher: Teacher, n: int) -> Cond:
    """The condition of n labels or prompts.

    Raises:
        UserError: the codec gives no condition for them, or one of another kind.
    """
    codec = teacher.codec
    prompts = [i % codec.classes if codec.classes else PROMPTS[i % 2] for i in range(n)]
    who = f"{teacher_at(teacher.source)}: codec.condition"
    try:
        cond = codec.condition(prompts)
    except Exception as error:
        raise UserError(
            f"{who}: it raised {type(error).__name__}: {clipped(first_line(error), 150)} for "
            f"{n} prompts such as {prompts[0]!r}; correct it, or set the codec's classes"
        ) from None
    remedy = f"return None, or a dict of tensors with a row for each of the {n} prompts"
    if cond is None:
        return None
    if not isinstance(cond, Mapping):
        raise UserError(f"{who}: it returns {type(cond).__name__}; {remedy}")
    for name, entry in cond.items():
        if not isinstance(entry, Tensor) or entry.ndim < 1 or len(entry) != n:
            got = shape_of(entry) if isinstance(entry, Tensor) else type(entry).__name__
            raise UserError(f"{who}: its entry {name!r} is {got or 'one number'}; {remedy}")
    return dict(cond)


def arguments_of(backbone: nn.Module, who: str) -> Arguments:
    """The arguments by which the backbone's class is built again.

    Each is looked up in the backbone's `config`, then among its attributes, then its default.

    Raises:
        UserError: one is not found, or a network built from them has other weights.
    """
    kind = type(backbone)
    config = getattr(backbone, "config", {})
    config = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    values: dict[str, Any] = {}
    for name, p in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        found = [v for v in (config.get(name), getattr(backbone, name, None)) if is_plain(v)]
        known = [v for v in found if v is not None]
        if known:
            values[name] = known[0]
        elif p.default is p.empty:
            raise UserError(
                f"{who}: {kind.__name__} is built with {name!r}, and a student's folder could not "
                f"know its value; keep it as self.{name}, a number, a text or a list of them"
            )
    if not is_built_alike(backbone, values):
        shown = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise UserError(
            f"{who}: {kind.__name__}({clipped(shown)}) has other weights than the teacher's; keep "
            "every argument of its __init__ as an attribute of its name"
        )
    return Arguments(values, [k for k, v in values.items() if isinstance(v, tuple)])


def is_built_alike(backbone: nn.Module, values: Mapping[str, Any]) -> bool:
    """Whether the backbone's class, built with these arguments, has weights of the same shapes.

    It is built without memory for weights, and where its code needs their values, with them.
    """
    shapes = {k: v.shape for k, v in backbone.state_dict().items()}
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=()), torch.device(device):
                built = type(backbone)(**values).state_dict()
            return {k: v.shape for k, v in built.items()} == shapes
        except Exception:  # code of the user's
            continue
    return False


def is_plain(value: Any) -> bool:
    """Whether a JSON file can hold it."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


# ---- students and critics


def student(
    teacher: Teacher, steps: int, start: float | None, renoise: Renoise, adapter: Adapter | None
) -> Generator:
    """A trainable few-step student that starts as the teacher; arguments as `schedulers.student`.

    Raises:
        UserError: the process has no such start, the adapter's targets match nothing, or the
            posterior shall be sampled.
    """
    if renoise == "posterior":
        raise UserError(
            "student.renoise: a network of your own is sampled with new noise, or along the ODE; "
            "set it to true or false"
        )
    source = network_of(teacher.denoiser)
    times = times_of(source.process, steps, start)
    view = view_of(source)
    if adapter is not None:
        network: Denoiser = AdaptedDenoiser(view, "student", config_by_layers(adapter, source))
    else:
        view.backbone = to_float32(deepcopy(source.backbone)).requires_grad_(True)
        network = view
    return Generator(network, times, renoise, grids=divisor_grids(times))


def times_of(process: Process, steps: int, start: float | None) -> list[float]:
    """The times of a student's steps: equal steps of t, from 1 or from the noise `start`.

    Raises:
        UserError: the process has no noise of that level.
    """
    first = 1.0
    if start is not None:
        first = process.time(torch.tensor(start, dtype=torch.float64)).item()
        if not 0 < first <= 1:
            raise UserError(
                f"student.start: {start} is out of range; give a σ/α that the teacher was trained "
                "with, or leave it out"
            )
    return [first * (1 - k / steps) for k in range(steps)]


def middle_of(network: Network) -> str:
    """The block that a critic reads by default.

    Raises:
        UserError: no block has a name that says so.
    """
    if isinstance(network, Pretrained):
        return network.middle
    children = dict(network.backbone.named_children())
    if (name := next((n for n in MIDDLES if n in children), None)) is not None:
        return f"backbone.{name}"
    lists = {n: m for n, m in children.items() if isinstance(m, nn.ModuleList | nn.Sequential)}
    if lists:
        name = max(lists, key=lambda n: len(lists[n]))
        return f"backbone.{name}.{len(lists[name]) // 2}"
    raise UserError(
        f"critic.blocks: missing; which block of {type(network.backbone).__name__} to read is not "
        f"known; name one, such as backbone.{next(iter(children), 'layer')}"
    )
