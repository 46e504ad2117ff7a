"""How fast something draws: latency, pictures per second and memory, at one picture and at many.

All of it is timed that stands between prompts and their pictures' bytes on the host: text encoders,
noise, every network evaluation, the decoder. Reading weights and writing files are outside of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from distill.data.prompts import list_prompts
from distill.profiling import device_name, evaluations_of, peak_memory
from teachers.denoiser import Denoiser, Network, computes
from teachers.teacher import Teacher

WARM = 2  # calls at each batch that are not timed: kernels are chosen in them, and memory reserved
LEAST, MOST = 5, 50  # calls that are
ENOUGH = 10.0  # seconds of them, after which there are no more than LEAST
GAIN = 1.1  # in pictures per second, for which a batch is doubled
CAP = 1024  # pictures at once

Make = Callable[[int], Any]  # draws so many pictures at once, and has them on the host


@dataclass(frozen=True)
class Timer:
    """What a machine is timed and weighed by.

    Args:
        clock: Seconds.
        settle: Waits until the device has nothing left to do.
        empty: Gives back memory that is not in use, and forgets the peak.
        peak: The most memory held since, in GB.
    """

    clock: Callable[[], float]
    settle: Callable[[], None]
    empty: Callable[[], None]
    peak: Callable[[], float]


def timer_of(device: torch.device) -> Timer:
    """The gauge of a device. A CPU's peak is the whole process's, from its start."""
    if device.type != "cuda":
        return Timer(time.perf_counter, lambda: None, lambda: None, lambda: peak_memory(device))

    def empty() -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    return Timer(
        time.perf_counter,
        lambda: torch.cuda.synchronize(device),
        empty,
        lambda: peak_memory(device),
    )


@dataclass(frozen=True)
class Timing:
    """What calls of one batch size took.

    Args:
        latency_ms, latency_p90_ms: Of a call: the median, and what nine in ten do not exceed.
        images_per_s: At the median.
        peak_memory_gb: The most held in any of them.
        calls: How many were timed.
    """

    batch: int
    latency_ms: float
    latency_p90_ms: float
    images_per_s: float
    peak_memory_gb: float
    calls: int


def timing(make: Make, batch: int, gauge: Timer) -> Timing:
    """The pace at one batch size, once warm."""
    gauge.empty()
    for _ in range(WARM):
        make(batch)
    gauge.settle()
    spent: list[float] = []
    while len(spent) < LEAST or (len(spent) < MOST and sum(spent) < ENOUGH):
        began = gauge.clock()
        make(batch)
        gauge.settle()
        spent.append(gauge.clock() - began)
    middle = median(spent)
    return Timing(
        batch, 1e3 * middle, 1e3 * quantile(spent, 0.9), batch / middle, gauge.peak(), len(spent)
    )


def quantile(values: list[float], share: float) -> float:
    """The quantile, linear between neighbours."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def saturated(make: Make, one: Timing, gauge: Timer, cap: int = CAP) -> tuple[Timing, str]:
    """The pace at the smallest batch of which twice as many gain less than GAIN, and why there.

    Batches are doubled from that of `one` on, until `cap` or the end of the device's memory.
    """
    best = one
    while 2 * best.batch <= cap:
        twice = 2 * best.batch
        try:
            found = timing(make, twice, gauge)
        except torch.cuda.OutOfMemoryError:
            gauge.empty()
            return best, f"out of memory at {twice}"
        gain = found.images_per_s / best.images_per_s
        if gain < GAIN:
            return best, f"{twice} at once give {gain:.2f}× the images/s"
        best = found
    return best, f"no more than {cap} are tried"


def measured(make: Make, counted: nn.Module, gauge: Timer, cap: int) -> dict[str, Any]:
    """Evaluations for a picture, and the paces of one picture and of a saturating batch.

    Args:
        counted: What one evaluation calls once.
    """
    with evaluations_of({"network": [counted]}) as counts:
        make(1)
    one = timing(make, 1, gauge)
    many, why = saturated(make, one, gauge, cap)
    return {
        "evaluations": counts["network"],
        "single": asdict(one),
        "saturated": asdict(many),
        "stopped": why,
    }


def evaluated(denoiser: Denoiser) -> nn.Module:
    """What one evaluation calls once, by our solvers and by stock pipelines alike."""
    inner = next(m for m in denoiser.modules() if computes(m))
    return inner.backbone if isinstance(inner, Network) else inner


def prompts(teacher: Teacher, n: int) -> list[str]:
    """What n pictures are asked for: classes in turn, or shipped prompts."""
    classes = getattr(teacher.codec, "classes", 0)
    if classes:
        return [str(i % classes) for i in range(n)]
    if teacher.codec.condition([""]) is None:
        return ["0"] * n
    known = [str(item.prompt) for item in list_prompts("pack:starter").items]
    return [known[i % len(known)] for i in range(n)]


def machine(denoiser: Denoiser, device: torch.device) -> dict[str, Any]:
    """What figures of speed hang on beside what draws."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "dtype": str(tensors[0].dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "memory": "allocated on the device" if cuda else "of the process, from its start",
    }
