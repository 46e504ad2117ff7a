"""Before training: whether the data and the teacher's x̂ of the first batch are finite numbers.

A NaN before any update is not the learning rate's fault; the check names what has it.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.config.schema import TrainSection
from distill.data.encode import broken_weight
from distill.data.stream import Source
from distill.profiling import FlopMeter, denoisers_in, evaluations_of
from distill.training.engine import shards_here, shards_of
from teachers import conditions
from teachers.denoiser import Denoiser
from teachers.errors import UserError
from teachers.teacher import Teacher


@torch.no_grad()
def check_finite(
    guided: Denoiser,
    teacher: Teacher,
    source: Source,
    train: TrainSection,
    accelerator: Accelerator,
) -> float | None:
    """Compute the teacher's x̂ of the first batch's first part, at times from 1 to nearly 0.

    Args:
        guided: The teacher that the objective has.

    Returns:
        The FLOPs of one sample through the teacher's network; None if no network was called.

    Raises:
        UserError: the data, their conditions, the network's x̂ or the guided x̂ hold NaN or
            infinity; the message names the first of these.
    """
    shards = shards_of(train, accelerator.num_processes)
    batch = source.batch(0, shards_here(shards, accelerator)[0], shards, train.batch // shards)
    for name, value in {"data": batch.x, **(batch.cond or {})}.items():
        if value is not None and _not_finite(value):
            which = "data" if name == "data" else f"condition {name!r}"
            raise UserError(
                f"data: the first batch's {which} hold {_not_finite(value)}; encode them anew "
                "(delete their cache under data.cache), and check the files that they come from"
            )
    device = accelerator.device
    noise, cond = batch.noise.to(device), conditions.moved(batch.cond, device)
    x = torch.zeros_like(noise) if batch.x is None else batch.x.to(device)
    t = torch.linspace(1, 0, len(noise) + 1, device=device)[:-1]
    x_t = guided.process.noise(x, t, noise)
    with accelerator.autocast():
        with FlopMeter() as meter, evaluations_of(denoisers_in({"teacher": guided})) as counts:
            estimate = guided(x_t, t, cond)
        if not (kind := _not_finite(estimate)):
            return meter.flops / counts["teacher"] if counts["teacher"] else None
        unguided = _not_finite(teacher.denoiser(x_t, t, cond))
    who = f"teacher {teacher.source!r}"
    if not unguided:
        raise UserError(
            f"teacher.guidance: with it, x̂ of the first batch holds {kind} before any training; "
            "without it, x̂ is finite; set teacher.guidance to 1, or check its keys"
        )
    raise UserError(f"{who}: {_reason(teacher.denoiser, unguided, train)}")


def _reason(network: nn.Module, kind: str, train: TrainSection) -> str:
    """Why a network's own x̂ may not be finite, and what to do."""
    fault = f"its network's x̂ of the first batch holds {kind}, before any training"
    if (weight := broken_weight(network)) is not None:
        return (
            f"{fault}: its weight {weight} is not finite; the files are damaged, fetch them again"
        )
    halves = any(p.dtype == torch.float16 for p in network.parameters())
    if train.precision == "fp16" or halves:
        key = "train.precision" if train.precision == "fp16" else "teacher.precision"
        return f"{fault}: float16 overflows in it; set {key} to bf16 or fp32"
    return f"{fault}; examine it with distill doctor"


def _not_finite(value: Tensor) -> str:
    """NaN or infinity, if a tensor holds it; else an empty string."""
    if not value.is_floating_point() or torch.isfinite(value).all():
        return ""
    return "NaN" if torch.isnan(value).any() else "infinity"
