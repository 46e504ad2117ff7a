"""Whose features a smaller network is compared by, and how far they are apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from students.architecture.change import places
from students.architecture.units import LISTS
from students.critic import image_stream
from students.lora import network_of
from teachers.denoiser import Denoiser
from teachers.errors import UserError, clipped

KEY = "objective.taps"  # which begins error messages
Scale = Literal["none", "norm", "masked"]
STAGES = re.compile(r"(down|up)_blocks\.\d+|mid_block")
BACKBONE = "backbone."  # of a network's module names
WORDS = ("blocks", "self-attention")


def taps_of(names: Sequence[str], student: Denoiser, teacher: Denoiser) -> dict[str, str]:
    """The modules of a student whose outputs are compared, and those of the teacher that they are
    compared with.

    Args:
        names: "blocks" (the stages of a UNet, else its blocks), "self-attention" (the `attn1` of
            every block), names of modules that both have, or STUDENT=TEACHER.

    Raises:
        UserError: there are no such modules in both.
    """
    small, large = network_of(student).backbone, network_of(teacher).backbone
    known, other = ({n for n, _ in m.named_modules() if n} for m in (small, large))
    rename, pairs = places(small, large), dict[str, str]()
    for name in names:
        if name in WORDS:
            chosen = {n: counterpart(n, rename) for n in known if meant(n, name)}
            pairs |= {k: v for k, v in sorted(chosen.items()) if v in other}
            if not any(k in pairs for k in chosen):
                raise UserError(f"{KEY}: the student and its teacher share no {name}; name modules")
            continue
        own, _, theirs = (v.removeprefix(BACKBONE) for v in name.partition("="))
        theirs = theirs or counterpart(own, rename)
        for module, there, who in ((own, known, "student"), (theirs, other, "teacher")):
            if module not in there:
                raise UserError(f"{KEY}: the {who} has no module {clipped(module)!r}; name another")
        pairs[own] = theirs
    return {BACKBONE + own: BACKBONE + theirs for own, theirs in pairs.items()}


def meant(module: str, word: str) -> bool:
    """Whether a module is one of those that a word stands for."""
    if word == "self-attention":
        return module.endswith(".attn1")
    return bool(STAGES.fullmatch(module)) or module.rpartition(".")[0] in LISTS


def counterpart(name: str, rename: Mapping[str, str]) -> str:
    """The teacher's module that a student's one was made of."""
    begins = (b for b in sorted(rename, key=len, reverse=True) if f"{name}.".startswith(f"{b}."))
    start = next(begins, None)
    return name if start is None else rename[start] + name[len(start) :]


def feature_loss(
    student: Mapping[str, Any], teacher: Mapping[str, Any], pairs: Mapping[str, str], scale: Scale
) -> Tensor:
    """How far features are apart, over all taps: ().

    Each is the mean square of the difference: `none`, as BK-SDM (arXiv:2305.15798); over that of
    the teacher's feature: `norm`, as LAPTOP-Diff (arXiv:2404.11098); or without what is more than
    two deviations from a sample's mean, on either side: `masked`, as TinyFusion (arXiv:2412.01199).
    The first two are sums over taps, and the last a mean.

    Args:
        student, teacher: Outputs (B, ...) of modules, by name.
        pairs: As `taps_of` returns them.
    """
    terms = [distance(image_stream(student[k]), image_stream(teacher[v]), scale)
             for k, v in pairs.items()]  # fmt: skip
    total = torch.stack(terms)
    return total.mean() if scale == "masked" else total.sum()


def distance(ours: Tensor, theirs: Tensor, scale: Scale) -> Tensor:
    """The distance () of one feature (B, ...), as `feature_loss` has it."""
    ours, theirs = ours.float(), theirs.detach().float()
    if scale == "masked":
        ours, theirs = inner(ours) * ours, inner(theirs) * theirs
    error = (ours - theirs).square().mean()
    if scale == "norm":
        return error / theirs.square().mean().clamp(min=torch.finfo(error.dtype).tiny)
    return error


@torch.no_grad()
def inner(x: Tensor) -> Tensor:
    """1 where a feature (B, ...) is within two deviations of its sample's mean, else 0."""
    dims = [*range(1, x.ndim)]
    away = (x - x.mean(dims, keepdim=True)).abs()
    return (away < 2 * x.std(dims, keepdim=True)).to(x.dtype)
