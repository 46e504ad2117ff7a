"""Single pieces of a training step, timed alone: what compilation, layouts and fusing win."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.attempts import one_line
from distill.training.ema import EMA
from gpu_parts.bare import cast, inputs
from gpu_parts.engine import Clock, fresh_graphs, release
from gpu_parts.rows import ROWS, source_of, teacher_of
from students.lora import Adapter, inject
from teachers.compiled import raise_limits
from teachers.edm.networks import Block

Experiment = Callable[[Clock, bool], dict[str, Any]]


def network_of(name: str, small: bool, device: torch.device) -> tuple[Any, Any, Any]:
    """A row's bare teacher, its denoiser, and its recipe."""
    row = next(r for r in ROWS if r.name == name)
    recipe = row.settings(small)
    teacher = teacher_of(row, recipe, small, device)
    return teacher, teacher.denoiser, recipe


def passes(clock: Clock, network: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """Milliseconds of a forward pass, and of a forward and a backward pass to the weights."""

    def both() -> None:
        network.call(*args, None).float().sum().backward()
        for p in network.parameters():
            p.grad = None

    network.requires_grad_(False)
    with torch.no_grad():
        forward = clock.time(lambda: network.call(*args, None))
    network.requires_grad_(True)
    return {"forward_ms": forward, "forward_backward_ms": clock.time(both)}


# ---- weights: optimiser, clipping, average


def updates(clock: Clock, params: list[Tensor]) -> dict[str, float]:
    """Milliseconds of clipping, fused AdamW and the average, for one list of weights."""
    weights = [nn.Parameter(p) for p in params]
    for p in weights:
        p.grad = torch.randn_like(p)
    adam = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    average = EMA(weights)
    clip = partial(nn.utils.clip_grad_norm_, weights, math.inf, foreach=True)
    return {
        "tensors": len(weights),
        "clip_ms": clock.time(clip),
        "adamw_ms": clock.time(adam.step),
        "ema_ms": clock.time(average.update),
    }


def optimiser(clock: Clock, small: bool) -> dict[str, Any]:
    """Separate tensors against one flat buffer, for EDM's weights and for SDXL's adapters."""
    figures = {}
    for name in ("edm-cifar-dmd2", "sdxl-dmd2-lora"):
        _, network, recipe = network_of(name, small, torch.device("meta"))
        params = list(network.parameters())
        if recipe.adapters is not None:
            adapter: Adapter = recipe.adapters.adapter
            inject(network, "student", adapter.config(network.LORA))
            named = network.named_parameters()
            params = [p for k, p in named if "student" in k.split(".")]
        separate = [torch.randn(p.shape, device=clock.device) for p in params]
        flat = [torch.cat([p.flatten() for p in separate])]
        figures[name] = {"separate": updates(clock, separate), "flat": updates(clock, flat)}
        del separate, flat
        release()
    return figures


def data(clock: Clock, small: bool) -> dict[str, Any]:
    """Milliseconds to make CIFAR's batches on the host, to move them, and on the device."""
    teacher, _, recipe = network_of("edm-cifar-dmd2", small, torch.device("cpu"))
    source, figures = source_of(recipe, teacher, small), {}
    for n in (2, 4) if small else (128, 512):
        batch = source.batch(0, 0, 1, n)
        noise = batch.noise if small else batch.noise.pin_memory()
        draws = iter(range(10**6))
        x = source.x
        assert x is not None
        there = x.to(clock.device)

        def on_device(n: int = n, there: Tensor = there) -> None:
            there[torch.randint(len(there), (n,), device=clock.device)]
            torch.randn(n, *teacher.shape, device=clock.device)

        figures[str(n)] = {
            "host_ms": clock.time(lambda n=n, draws=draws: source.batch(next(draws), 0, 1, n), 20),
            "move_ms": clock.time(lambda noise=noise: noise.to(clock.device), 20),
            "device_ms": clock.time(on_device, 20),
        }
    return figures


# ---- SDXL's forward pass


def sdxl(clock: Clock, small: bool) -> dict[str, Any]:
    """SDXL's UNet in autocast, in its own type, with compiled blocks; and a sample's time at 4, 8.

    What a sample costs less at 8 than at 4 is the most that teacher and fake score could win by
    running in one batch.
    """
    teacher, network, _ = network_of("sdxl-dmd2-lora", small, clock.device)
    network.to(torch.bfloat16)
    figures: dict[str, Any] = {}

    @torch.no_grad()
    def forward(n: int, native: bool = True) -> float:
        args = inputs(teacher, n, clock.device)
        with cast(native, "bf16", clock.device):
            return clock.time(lambda: network.call(*args, None))

    figures["autocast_ms"] = forward(4, native=False)
    figures["native_ms"] = forward(4)
    figures["native_ms_at_8"] = forward(8)
    figures["sample_at_8_over_4"] = figures["native_ms_at_8"] / figures["native_ms"] / 2
    if not small:
        fresh_graphs()
        network.backbone.compile_repeated_blocks(dynamic=False)
        figures["blocks_ms"] = forward(4)
    return figures


# ---- EDM's network, compiled


def compiled_edm(clock: Clock, small: bool) -> dict[str, Any]:
    """EDM's CIFAR-10 network: eager, blocks compiled, fully compiled; two memory layouts."""
    figures: dict[str, Any] = {}
    for kind in ("eager", "blocks", "full"):
        if small and kind != "eager":
            continue
        for layout in ("contiguous", "channels_last"):
            fresh_graphs()
            figures[f"{kind}, {layout}"] = _edm(clock, small, kind, layout)
            release()
    return figures


def _edm(clock: Clock, small: bool, kind: str, layout: str, mode: str | None = None) -> Any:
    teacher, network, recipe = network_of("edm-cifar-dmd2", small, clock.device)
    network.to(torch.bfloat16)
    x, t, cond = inputs(teacher, recipe.train.batch, clock.device)
    if layout == "channels_last":
        network.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if kind == "blocks":
        for module in network.backbone.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
    elif kind == "full":
        network.backbone.compile(dynamic=False, mode=mode)
    return passes(clock, network, (x, t, cond))


def cuda_graphs(clock: Clock, small: bool) -> dict[str, Any]:
    """Whole networks compiled with CUDA graphs (mode reduce-overhead): the digits', and EDM's."""
    if small:
        return {}
    from teachers import load

    figures = {}
    for mode in (None, "reduce-overhead"):
        fresh_graphs()
        teacher = load("digits")
        network: Any = teacher.denoiser.to(clock.device)
        network.to(torch.bfloat16)
        network.backbone.compile(dynamic=False, mode=mode)
        args = inputs(teacher, 64, clock.device)
        figures[f"digits, {mode or 'default'}"] = passes(clock, network, args)
        del teacher, network, args
        release()
    fresh_graphs()
    figures["edm, reduce-overhead"] = _edm(clock, small, "full", "contiguous", "reduce-overhead")
    return figures


EXPERIMENTS: dict[str, Experiment] = {
    "optimiser": optimiser,
    "data": data,
    "sdxl_forward": sdxl,
    "edm_compiled": compiled_edm,
    "cuda_graphs": cuda_graphs,
}


def run(
    clock: Clock,
    small: bool,
    results: dict[str, Any],
    save: Callable[[], None],
    say: Callable[[str], None],
    left: Callable[[], float],
) -> None:
    """Run the experiments in order, each into the results, while there are seconds left."""
    raise_limits()
    for name, experiment in EXPERIMENTS.items():
        if left() <= 0:
            results[name] = {"not_run": "the budget is over"}
            say(f"{name}: not run: the budget is over")
            continue
        try:
            results[name] = experiment(clock, small)
        except Exception as error:
            results[name] = {"error": one_line(error)}
            error.__traceback__ = None  # its frames hold tensors
        release()
        save()
        for key, value in results[name].items():
            say(f"{name}: {key}: {shown(value)}")


def shown(value: Any) -> str:
    """Figures as text."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
