"""Where a run would train: a card by its name, or this machine, with memory and speed."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import Any

import torch

from distill.planning.plan import Plan
from distill.profiling import FlopMeter, device_name
from distill.rates import BUSY, GPUS, key_of
from students.lora import network_of
from students.own_network import example_condition, is_own
from teachers import conditions
from teachers.errors import UserError
from teachers.teacher import Teacher

STEP = 1.2  # a step's seconds over those of its FLOPs in a forward pass: of digits and of shapes
SAMPLES = 32  # of the forward pass that is timed
MATRIX = 2048  # side of the matrices that are multiplied where there are no weights


@dataclass(frozen=True)
class Machine:
    """A card, or this machine.

    Args:
        name: As in `distill.rates.GPUS`, or the device's own.
        memory: In GB.
        price: Dollars an hour; 0 where it is not rented.
        rate: FLOP/s, as timed here; 0 of a known card, whose rates are in `distill.rates`.
        gpu: Whether it is a GPU.
    """

    name: str
    memory: float
    price: float = 0.0
    rate: float = 0.0
    gpu: bool = True

    def seconds(self, plan: Plan) -> float:
        """Of one training step."""
        if self.rate:
            return STEP * plan.flops / self.rate
        return plan.seconds(plan.share(self.name))

    def speed_text(self, plan: Plan) -> str:
        """Where the seconds come from."""
        if self.rate:
            return "as timed here"
        share = plan.share(self.name)
        kind = "measured" if share.source else "assumed"
        return f"at {share.value:.0%} of the card's rate, {kind}"


def check_gpu(gpu: str | None) -> None:
    """Refuse the name of an unknown card.

    Raises:
        UserError: it lists those that are known.
    """
    if gpu is not None and gpu not in GPUS:
        plain = {re.sub(r"[^a-z0-9]", "", name): name for name in GPUS}
        if (meant := plain.get(re.sub(r"[^a-z0-9]", "", gpu.lower()))) is not None:
            raise UserError(f"--gpu {gpu!r}: did you mean {meant!r}?")
        known = ", ".join(f"{name} ({card.memory:g} GB)" for name, card in GPUS.items())
        raise UserError(f"--gpu {gpu!r}: an unknown card; known: {known}")


def machine_of(gpu: str | None, teacher: Teacher, weights: bool) -> Machine:
    """The card of that name, or this machine.

    Args:
        weights: Whether the teacher has values, so that its network can be timed.
    """
    here = key_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if (name := gpu or here) is not None:
        return Machine(name, GPUS[name].memory, GPUS[name].price)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        name, memory = device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name = f"this machine's CPU, {torch.get_num_threads()} threads"
        name = name.removesuffix("s") if torch.get_num_threads() == 1 else name
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights and next(teacher.denoiser.parameters(), None) is not None:
        rate = network_rate(teacher, device)
    else:
        rate = matrix_rate(device) * BUSY
    return Machine(name, memory / 1e9, 0.0, rate, device.type == "cuda")


@torch.no_grad()
def network_rate(teacher: Teacher, device: torch.device) -> float:
    """FLOP/s of the teacher's network in forward passes."""
    network = network_of(teacher.denoiser).to(device)
    x = torch.randn(SAMPLES, *teacher.shape, generator=torch.Generator().manual_seed(0))
    prompts = [0] * SAMPLES if teacher.codec.classes else [""] * SAMPLES
    own = is_own(teacher.denoiser)
    cond = example_condition(teacher, SAMPLES) if own else teacher.codec.condition(prompts)
    x, cond = x.to(device), conditions.moved(cond, device)
    t = torch.linspace(1, 0.1, SAMPLES, device=device)
    with FlopMeter() as meter:
        network(x, t, cond)
    return meter.flops / _best_of_three(lambda: network(x, t, cond), device)


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a product of matrices in float32."""
    a = torch.ones(MATRIX, MATRIX, device=device)
    return 2 * MATRIX**3 / _best_of_three(lambda: a @ a, device)


def _best_of_three(function: Any, device: torch.device) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
