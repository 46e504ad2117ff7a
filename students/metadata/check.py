"""Checks of a file's header against the stock pipeline that has just drawn with the student."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from students.metadata import comfyui
from students.metadata.header import data_sha256, read_header, replace_metadata
from students.metadata.keys import HASH, VERIFIED

MOST = 4 << 20  # bytes of a header that ComfyUI's front end reads
SIGMA = 1e-6  # the largest difference of two σ, absolute below 1 and relative above


class Times(NamedTuple):
    """σ of each step, without the final 0, and the times that the network was given."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


def times_used(scheduler: Any) -> Times:
    """The times that a stock pipeline's last call has set in its scheduler."""
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    if (bar := getattr(scheduler, "alphas_cumprod", None)) is not None:
        at = bar.double()[[int(t) for t in timesteps]].clamp(min=1e-12)
        return Times(tuple(((1 - at) / at).sqrt().tolist()), timesteps)
    sigmas = torch.as_tensor(scheduler.sigmas).double()[:-1].clamp(max=1)
    return Times(tuple(sigmas.tolist()), timesteps)


def check_header(path: Path, used: Mapping[int, Times]) -> None:
    """Compare what a file says of its steps with what a stock pipeline did.

    Args:
        used: By step count, the times that the pipeline used.

    Raises:
        ValueError: a σ or an index differs, the graph is one that ComfyUI refuses, or the header is
            longer than its front end reads.
    """
    header = read_header(path)
    if header.start > MOST:
        raise ValueError(f"its header has {header.start} bytes, and ComfyUI reads {MOST}")
    metadata = header.metadata
    sigmas = json.loads(metadata["turbo.sigmas"])
    timesteps = json.loads(metadata.get("turbo.timesteps", "null"))
    for steps, times in used.items():
        check_sigmas("turbo.sigmas", sigmas.get(str(steps), []), [*times.sigmas, 0.0], steps)
        if timesteps is not None and timesteps.get(str(steps)) != [
            round(t) for t in times.timesteps
        ]:
            raise ValueError(
                f"turbo.timesteps at {steps} steps is {timesteps.get(str(steps))}, and the stock "
                f"pipeline used {[round(t) for t in times.timesteps]}"
            )
    if "prompt" in metadata:
        graph, most = json.loads(metadata["prompt"]), max(used)
        if faults := comfyui.faults(graph):
            raise ValueError(f"its ComfyUI graph: {faults[0]}")
        wanted = comfyui.comfyui_sigmas([*used[most].sigmas, 0.0])
        check_sigmas("its ComfyUI graph", comfyui.graph_sigmas(graph), wanted, most)


def check_sigmas(what: str, stated: Sequence[float], wanted: Sequence[float], steps: int) -> None:
    """Compare two lists of σ.

    Raises:
        ValueError: they differ by more than rounding.
    """
    same = len(stated) == len(wanted) and all(
        math.isclose(a, b, rel_tol=SIGMA, abs_tol=SIGMA)
        for a, b in zip(stated, wanted, strict=False)
    )
    if not same:
        raise ValueError(
            f"{what} at {steps} steps has σ {[round(float(s), 6) for s in stated]}, and the stock "
            f"pipeline used {[round(s, 6) for s in wanted]}"
        )


def finish_header(path: Path, difference: float) -> None:
    """Write into a file's header what is known only of the finished file.

    Args:
        difference: The largest difference of a pixel from the student's, over all step counts.
    """
    metadata = read_header(path).metadata
    verified = json.loads(metadata[VERIFIED])
    verified["max_abs"] = float(f"{difference:.2e}")
    metadata |= {VERIFIED: json.dumps(verified), HASH: f"0x{data_sha256([path])}"}
    replace_metadata(path, metadata)
