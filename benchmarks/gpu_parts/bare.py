"""What a row's bare network costs, its errors in each type, and what is planned for the row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.planning.forecast import plan
from distill.profiling import FusedAttention, Meter
from distill.training.engine import Engine
from gpu_parts.engine import GB, Clock, engine_of, release, stream_of
from gpu_parts.rows import Row, teacher_of
from students.checkpointing import checkpointing
from students.lora import unwrap
from teachers import conditions
from teachers.compiled import compile_modules, compiled_forward, running_compiled
from teachers.features import tapped


def inputs(teacher: Any, n: int, device: torch.device) -> tuple[Tensor, Tensor, Any]:
    """Random x_t (n, ...), times (n,) from 0.05 to 0.95, and a condition."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(n, *teacher.shape, generator=rng).to(device)
    t = torch.linspace(0.95, 0.05, n).to(device)
    return x, t, conditions.moved(teacher.codec.condition([0] * n), device)


@torch.no_grad()
def errors_of(network: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """‖F - F in float32‖ / ‖F in float32‖ of the bare network's output, for each way to run it.

    The network is left in bfloat16, where the last way works.
    """
    device = args[0].device
    precise = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    network.to(torch.float32)
    truth = network.call(*args, None).float()
    torch.backends.cudnn.allow_tf32 = precise

    def error(output: Tensor) -> float:
        return float((output.float() - truth).norm() / truth.norm().clamp(min=1e-30))

    errors = {}
    halves = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}
    for name, dtype in halves.items():
        with torch.autocast(device.type, dtype, cache_enabled=False):
            errors[name] = error(network.call(*args, None))
    network.to(torch.bfloat16)
    errors["bf16_native"] = error(network.call(*args, None))
    return errors


@contextmanager
def cast(native: bool, precision: str, device: torch.device) -> Iterator[None]:
    """Autocast where the weights are not in the type to compute in."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if native or dtype is None:
        yield
    else:
        with torch.autocast(device.type, dtype, cache_enabled=False):
            yield


def compiled_names(engine: Engine) -> list[str]:
    """The modules of the teacher's network that are compiled, by name: "" is the whole network."""
    backbone = unwrap(engine.objective.teacher).backbone
    return [k for k, m in backbone.named_modules() if compiled_forward(m) is not None]


def bare_figures(
    row: Row, recipe: Recipe, small: bool, clock: Clock, compiled: list[str]
) -> dict[str, Any]:
    """Milliseconds of the bare network's passes at the row's batch, in its native type.

    Args:
        compiled: Which of its modules are compiled, as the engine's are.

    Returns:
        "errors"; "bare_ms" of a "forward" pass, and of a forward and a backward pass to the input
        or to the weights; "bare_type", the type of its weights.
    """
    device = clock.device
    teacher = teacher_of(row, recipe, small, device)
    network: Any = teacher.denoiser
    n = recipe.train.batch // recipe.train.accumulate
    args = inputs(teacher, n, device)
    figures: dict[str, Any] = {"errors": errors_of(network, args), "bare_batch": n}
    native = recipe.train.precision == "bf16"
    if not native:
        network.to(torch.float32)
    figures["bare_type"] = str(next(network.backbone.parameters()).dtype).removeprefix("torch.")
    if recipe.train.checkpointing:
        checkpointing(network.backbone)
    compile_modules(network.backbone.get_submodule(name) for name in compiled)
    full = recipe.adapters is None
    x, t, cond = args

    def forward() -> Tensor:
        with cast(native, recipe.train.precision, device):
            return network.call(x, t, cond, None)

    def backward() -> None:
        forward().float().sum().backward()
        x.grad = None
        for p in network.parameters():
            p.grad = None

    with running_compiled():
        with torch.no_grad():
            times = {"forward": clock.time(forward)}
        if full:
            network.requires_grad_(True)
        else:
            x.requires_grad_(True)
        times["full" if full else "input"] = clock.time(backward)
    if full:  # the backward pass to the input alone has half of the products
        times["input"] = (times["forward"] + times["full"]) / 2
    figures["bare_ms"] = {k: round(v, 3) for k, v in times.items()}
    return figures


def bound_of(figures: dict[str, Any], critic: float) -> float:
    """Milliseconds of the bare passes that an average step needs.

    Args:
        critic: The share of the forward pass's FLOPs that a critic's pass has.
    """
    bare, n = figures["bare_ms"], figures["bare_batch"]
    total = 0.0
    for kind, samples in figures["samples"].items():
        share = critic if kind.startswith("critic ") else 1.0
        pass_ = kind.removeprefix("critic ")
        cost = bare.get(pass_, bare["input"])  # adapters' weights: as to the input
        total += share * cost * samples / n
    return total


# ---- losses in other precisions


def loss_distances(
    row: Row, recipe: Recipe, small: bool, out: Path, device: torch.device, steps: int = 2
) -> dict[str, float]:
    """The largest |loss - loss in float32| / |loss in float32| of the first turns, by precision.

    The same seeds and weights, without compilation.
    """
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16", *(("fp16",) if device.type == "cuda" else ())):
        keys = {**recipe.tree()["train"], "precision": precision}
        if "compile" in keys:
            keys["compile"] = "off"
        other = Recipe.check({**recipe.tree(), "train": keys})
        engine = engine_of(row, other, small, out, device)
        stream = stream_of(engine)
        logs = [engine.advance(stream) for _ in range(steps)]
        stream.close()
        losses[precision] = [
            float(v) for log in logs for k, v in log.items() if k.endswith("/loss")
        ]
        del engine, logs
        release()
    truth = losses.pop("fp32")
    return {
        f"loss_{name}": max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(v, truth, strict=True))
        for name, v in losses.items()
    }


# ---- plans and FLOPs, on fake tensors


def planned(row: Row, recipe: Recipe, small: bool) -> dict[str, Any]:
    """What `distill plan` says of the row, and the FLOPs of the bare network's passes a sample."""
    warnings.filterwarnings("ignore")
    found = plan(recipe, lambda fake: teacher_of(row, recipe, small, fake))
    state = found.weights + found.optimizer + found.average
    return {
        "plan_gb": found.peak,
        "plan_state_gb": state / GB,
        "plan_tflop": found.flops / 1e12,
        "plan_evaluations": found.evaluations,
        "flops": flops_of(row, recipe, small),
    }


def flops_of(row: Row, recipe: Recipe, small: bool) -> dict[str, float]:
    """FLOPs of one sample through the bare network, for each kind of `Calls`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    teacher = teacher_of(row, recipe, small, fake)
    network: Any = teacher.denoiser
    if recipe.train.checkpointing:
        checkpointing(network.backbone)
    costs = {}
    with fake:
        x, t = torch.zeros(1, *teacher.shape), torch.full((1,), 0.5)
        cond = conditions.each(teacher.codec.condition([0]), torch.clone)
    for who in ("", "critic ") if recipe.critic is not None else ("",):
        for kind in ("forward", "input", "full"):
            if kind == "full" and recipe.adapters is not None:
                costs[f"{who}full"] = costs[f"{who}input"]
                continue
            network.requires_grad_(kind == "full")
            with fake:
                x = x.detach().requires_grad_(kind == "input")
            run = nullcontext() if kind != "forward" else torch.no_grad()
            with fake, run, Meter(set()) as meter, FusedAttention(meter):
                block = network.middle
                if who:
                    with tapped(network, (block,), stop=True) as outputs:
                        network(x, t, cond)
                    output = outputs[block]
                else:
                    output = network(x, t, cond)
                if kind != "forward":
                    output.float().sum().backward()
            costs[f"{who}{kind}"] = float(meter.flops)
    return costs
