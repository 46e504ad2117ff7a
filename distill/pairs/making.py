"""Makes pairs: samples of the guided teacher from given noise, and the noise behind given data.

A shard's pairs depend on the settings and on their numbers alone: noise is seeded for each pair,
and a shard is always cut into the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.encode import COND, device, encoders_on
from distill.data.stream import Source
from distill.pairs.settings import PairSettings, data_of, prompts_of
from distill.sampling.guided_teacher import guided
from distill.sampling.student_sampler import default_batch
from distill.sampling.teacher_sampler import counted
from distill.seeds import seed_of
from teachers import conditions
from teachers.conditions import Cond
from teachers.denoiser import Denoiser, computes
from teachers.solver import heun_step, solve, solve_through
from teachers.teacher import Teacher

PATH = "path"  # of a pair: the states between noise and data
CLEAN = 0.002  # σ/α at which data are taken as they are, where a process begins at less


class Maker:
    """Makes the pairs with given numbers.

    Args:
        teacher: Unguided; its networks are on the device that they compute on.
    """

    def __init__(self, settings: PairSettings, teacher: Teacher) -> None:
        self.settings, self.teacher = settings, teacher
        self.prompts = prompts_of(settings, teacher)
        self.places = list(range(len(self.prompts)))  # of prompts, in the order of pairs
        if not teacher.codec.classes:  # few pairs are of prompts from the whole list
            self.places = self._shuffled("prompts", len(self.prompts)).tolist()
        self.data: Source | None = data_of(settings, teacher)
        self.denoiser = guided(settings.teacher, teacher)
        self.batch = default_batch(teacher)

    def make(self, numbers: range) -> tuple[dict[str, Tensor], int]:
        """Tensors (N, ...) by name, on the CPU, and the network evaluations that they took.

        `noise` is unit noise and `x` data; `path` (N, T, ...) are states between them, if they are
        asked for. Entries of the condition begin with "cond.". `prompt` is the number of the
        prompt, or -1 of inverted pairs.
        """
        return joined(list(self.parts(numbers)))

    @torch.no_grad()
    def parts(self, numbers: range) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The same of one batch of the networks after another."""
        networks = [m for m in self.denoiser.modules() if computes(m)]
        count = self.settings.count
        for low in range(numbers.start, numbers.stop, self.batch):
            part = range(low, min(low + self.batch, numbers.stop))
            drawn = range(part.start, min(part.stop, count))
            inverted = range(max(part.start, count), part.stop)
            with counted(networks) as sizes:
                made = [self._sampled(drawn)] if drawn else []
                made += [self._inverted(inverted)] if inverted else []
            yield joined([(tensors, 0) for tensors in made])[0], sum(sizes)

    def _sampled(self, numbers: range) -> dict[str, Tensor]:
        z = torch.stack([self._noise(i) for i in numbers])
        places = [self.places[i % len(self.places)] for i in numbers]
        cond = encoded(self.teacher, [self.prompts[p] for p in places])
        where, settings = device(), self.settings
        start, moved = z.to(where), conditions.moved(cond, where)
        given = self.denoiser, start, settings.steps, settings.solver, moved
        if not settings.states:
            return _tensors(z, solve(*given), cond, torch.tensor(places))
        x, path = solve_through(*given, settings.states)
        return {**_tensors(z, x, cond, torch.tensor(places)), PATH: path.float().cpu()}

    def _inverted(self, numbers: range) -> dict[str, Tensor]:
        assert self.data is not None
        index = torch.tensor([(i - self.settings.count) % self.data.size for i in numbers])
        x, cond, *_ = self.data.take(self._shuffled("inverted", self.data.size)[index])
        assert x is not None
        where, second = device(), self.settings.solver != "ddim"
        z = invert(
            self.denoiser,
            x.to(where),
            self.settings.steps,
            second,
            conditions.moved(cond, where),
        )
        return _tensors(z, x, cond, torch.full((len(x),), -1))

    def _shuffled(self, name: str, size: int) -> Tensor:
        """The numbers below `size` in an order of the seed and the name."""
        rng = torch.Generator().manual_seed(seed_of(self.settings.seed, name))
        return torch.randperm(size, generator=rng)

    def _noise(self, number: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed_of(self.settings.seed, "pair", number))
        return torch.randn(self.teacher.shape, generator=rng)


def joined(parts: Sequence[tuple[dict[str, Tensor], int]]) -> tuple[dict[str, Tensor], int]:
    """Several parts' tensors as one, and the sum of their evaluations."""
    tensors = {k: torch.cat([part[k] for part, _ in parts]) for k in parts[0][0]}
    return tensors, sum(evaluations for _, evaluations in parts)


def encoded(teacher: Teacher, prompts: Sequence[Any]) -> Cond:
    """The condition of these prompts; each distinct one is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    with encoders_on(teacher, device()):
        cond = conditions.moved(teacher.codec.condition(distinct), "cpu")
    index = torch.tensor([distinct.index(p) for p in prompts])
    return conditions.rows(cond, index)


def invert(
    denoiser: Denoiser, x: Tensor, steps: int, second: bool = True, cond: Cond = None
) -> Tensor:
    """The unit noise (B, ...) that the probability-flow ODE leads data x to.

    The times are those of the solver's grid, upwards from a level σ/α of `CLEAN` or the process's
    lowest, where x is taken as it is. An end without data takes the last step in first order.

    Args:
        second: Heun's steps, as `heun_step`; else DDIM's. Twice as many evaluations.
    """
    process = denoiser.process
    times = process.grid(steps).flip(0).to(x.device)
    clean = process.time(torch.full_like(times[:1], CLEAN)).clamp(min=0)
    times = torch.cat([clean, times[times > clean]]).to(x.dtype)
    rows = [t.expand(len(x)) for t in times]
    x_t = process.at(rows[0], x)[0] * x
    for t, s in zip(rows, rows[1:], strict=False):
        alpha = process.scales(s[:1].double())[0]
        if second and alpha.item() > 0:
            x_t = heun_step(denoiser, x_t, t, s, cond)
        else:
            x_t = process.step(x_t, denoiser(x_t, t, cond), t, s)
    return x_t / process.at(rows[-1], x)[1]


def _tensors(z: Tensor, x: Tensor, cond: Cond, prompt: Tensor) -> dict[str, Tensor]:
    entries = {f"{COND}{k}": v.cpu() for k, v in (cond or {}).items()}
    return {"noise": z.float().cpu(), "x": x.float().cpu(), "prompt": prompt, **entries}
