"""The speed of sampling: latency, images per second and memory, for one image and for a batch.

The time runs from prompts to bytes of images in host memory: text encoders, noise, every network
evaluation, the decoder. Reading weights and writing files are not timed.
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

WARM_UP = 2  # untimed calls at each batch size: they select kernels and reserve memory
MIN_CALLS, MAX_CALLS = 5, 50  # timed calls
SECONDS = 10.0  # of timed calls, after which no more than MIN_CALLS are made
GAIN = 1.1  # in images per second: a smaller gain ends the doubling of the batch
MAX_BATCH = 1024

Sample = Callable[[int], Any]  # samples that many images in one batch, and waits for them


@dataclass(frozen=True)
class Timer:
    """The clock and the memory counter of a machine.

    Args:
        clock: Returns seconds.
        settle: Waits until the device has finished its work.
        empty: Frees unused memory, and resets the peak.
        peak: Returns the peak of memory since the last reset, in GB.
    """

    clock: Callable[[], float]
    settle: Callable[[], None]
    empty: Callable[[], None]
    peak: Callable[[], float]


def timer_of(device: torch.device) -> Timer:
    """The timer of a device. On a CPU the peak is that of the whole process, from its start."""
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
    """The speed at one batch size.

    Args:
        latency_ms, latency_p90_ms: The median and the 90th percentile of a call.
        images_per_s: At the median latency.
        peak_memory_gb: The peak over all calls.
        calls: The number of timed calls.
    """

    batch: int
    latency_ms: float
    latency_p90_ms: float
    images_per_s: float
    peak_memory_gb: float
    calls: int


def timing(sample: Sample, batch: int, timer: Timer) -> Timing:
    """The speed at one batch size, after warm-up."""
    timer.empty()
    for _ in range(WARM_UP):
        sample(batch)
    timer.settle()
    seconds: list[float] = []
    while len(seconds) < MIN_CALLS or (len(seconds) < MAX_CALLS and sum(seconds) < SECONDS):
        start = timer.clock()
        sample(batch)
        timer.settle()
        seconds.append(timer.clock() - start)
    middle = median(seconds)
    return Timing(
        batch,
        1e3 * middle,
        1e3 * quantile(seconds, 0.9),
        batch / middle,
        timer.peak(),
        len(seconds),
    )


def quantile(values: list[float], share: float) -> float:
    """The quantile, linear between neighbouring values."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def saturate(
    sample: Sample, single: Timing, timer: Timer, max_batch: int = MAX_BATCH
) -> tuple[Timing, str]:
    """The speed at the smallest batch whose double gains less than GAIN, and the reason to stop.

    The batch is doubled from that of `single`, up to `max_batch` or to the end of the device's
    memory.
    """
    best = single
    while 2 * best.batch <= max_batch:
        twice = 2 * best.batch
        try:
            larger = timing(sample, twice, timer)
        except torch.cuda.OutOfMemoryError:
            timer.empty()
            return best, f"out of memory at {twice}"
        gain = larger.images_per_s / best.images_per_s
        if gain < GAIN:
            return best, f"a batch of {twice} gives {gain:.2f}× the images/s"
        best = larger
    return best, f"batches of more than {max_batch} are not tried"


def measure(sample: Sample, counter: nn.Module, timer: Timer, max_batch: int) -> dict[str, Any]:
    """Evaluations of one image, and the speed for one image and for a saturating batch.

    Args:
        counter: The module that one evaluation calls once.
    """
    with evaluations_of({"network": [counter]}) as counts:
        sample(1)
    single = timing(sample, 1, timer)
    saturated, reason = saturate(sample, single, timer, max_batch)
    return {
        "evaluations": counts["network"],
        "single": asdict(single),
        "saturated": asdict(saturated),
        "stopped": reason,
    }


def evaluated_module(denoiser: Denoiser) -> nn.Module:
    """The module that one evaluation calls once, with our solvers and in stock pipelines."""
    inner = next(m for m in denoiser.modules() if computes(m))
    return inner.backbone if isinstance(inner, Network) else inner


def prompts(teacher: Teacher, n: int) -> list[str]:
    """Prompts for n images: classes in turn, or shipped captions."""
    classes = teacher.codec.classes
    if classes:
        return [str(i % classes) for i in range(n)]
    if teacher.codec.condition([""]) is None:
        return ["0"] * n
    texts = [str(item.prompt) for item in list_prompts("pack:starter").items]
    return [texts[i % len(texts)] for i in range(n)]


def machine(denoiser: Denoiser, device: torch.device) -> dict[str, Any]:
    """The device, type of weights, version and threads that the speed depends on."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "dtype": str(tensors[0].dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "memory": "allocated on the device" if cuda else "of the process, from its start",
    }
