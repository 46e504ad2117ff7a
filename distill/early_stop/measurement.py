"""What guards measure: samples of student and teacher on prompts that training does not use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.data.encode import encoders_on, images_at_once, picture_shape
from distill.data.from_recipe import expansion_of
from distill.data.listing import Item
from distill.data.pictures import Picture, picture, signed
from distill.early_stop import scores
from distill.early_stop.guards import Guards
from distill.sampling.guided_teacher import guided
from distill.sampling.timesteps import initial_state
from distill.seeds import seed_of
from students.export.folder import sample_student
from students.generator import Generator
from teachers import conditions
from teachers.solver import SOLVERS
from teachers.storage.files import home
from teachers.teacher import Teacher

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # beside captions, in lower case


# Data (N, ...), their prompts or labels, and whether gradients are taken -> (N,).
Judge = Callable[[Tensor, Sequence[Any], bool], Tensor]


def guards_of(
    recipe: Recipe,
    teacher: Teacher,
    student: Generator,
    others: Sequence[Any],
    judge: Judge | None = None,
) -> Guards | None:
    """The checks of `train.guards`; None if the recipe has none.

    Args:
        others: Prompts or labels for recipes without captions.
        judge: A reward that is no part of the loss.
    """
    train = recipe.train
    if train.guards is None:
        return None
    expansion = expansion_of(recipe)
    if expansion is not None:
        others = expansion.expansion.tests or expansion.expansion.captions
    batch = max(1, train.batch // train.accumulate)  # fits the device, as training does
    return Guards(train.guards, Measurement(recipe, teacher, student, others, batch, judge))


class Measurement:
    """Scores of a student on fixed prompts and noise; the teacher is sampled once.

    Args:
        prompts: Prompts or labels, each sampled `train.guards.samples` times.
        batch: Samples in one call of a network.
        judge: As `guards_of` has it.
    """

    def __init__(
        self, recipe: Recipe, teacher: Teacher, student: Generator, prompts: Sequence[Any],
        batch: int, judge: Judge | None = None,
    ) -> None:  # fmt: skip
        limits = recipe.train.guards
        assert limits is not None
        self.recipe, self.teacher, self.student = recipe, teacher, student
        self.batch, self.samples, self.judge = batch, limits.samples, judge
        self.prompts = list(dict.fromkeys(prompts))[: limits.prompts]
        self.device = next(student.parameters()).device
        self._references: tuple[Tensor, Tensor | None] | None = None
        self._standard: Tensor | None = None  # the judge's rewards of the teacher's samples (P, S)
        self._cond: Any = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The student's scores with its current weights, in its fewest steps."""
        if self._references is None:
            with encoders_on(self.teacher, self.device):
                repeated = [p for p in self.prompts for _ in range(self.samples)]
                self._cond = self.teacher.codec.condition(repeated)
                self._references = self._teacher_samples(), self._pictures()
        teacher, pictures = self._references
        student = self.student.at(min(self.student.counts))
        repeated = [p for p in self.prompts for _ in range(self.samples)]
        seed = seed_of(self.recipe.train.seed, "guards", "student")
        x = sample_student(student, self.teacher, repeated, seed, self.batch, self._cond)
        x = self._by_prompt(x)
        found = {
            "diversity": scores.diversity(x, teacher),
            "matching": scores.matching(x, teacher),
        }
        if pictures is not None:
            found["nearest"] = scores.nearest(x, teacher, pictures)
        if self.judge is not None:
            if self._standard is None:
                self._standard = self._judged(teacher, self.judge)
            found["held_out"] = scores.preferred(self._judged(x, self.judge), self._standard)
        return found

    def _judged(self, x: Tensor, judge: Judge) -> Tensor:
        """Rewards (P, S) of samples (P, S, ...), a batch at a time."""
        x = x.flatten(0, 1)
        prompts = [p for p in self.prompts for _ in range(self.samples)]
        parts = [
            judge(x[i : i + self.batch].to(self.device), prompts[i : i + self.batch], False).cpu()
            for i in range(0, len(x), self.batch)
        ]
        return torch.cat(parts).float().unflatten(0, (len(self.prompts), self.samples))

    def _by_prompt(self, x: Tensor) -> Tensor:
        """Samples (N, ...) as (P, S, ...), on the CPU."""
        return x.float().cpu().unflatten(0, (len(self.prompts), self.samples))

    def _teacher_samples(self) -> Tensor:
        """The guided teacher's samples (P, S, ...), in `eval.teacher_steps` steps."""
        cfg = self.recipe.eval
        denoiser, solver = guided(self.recipe.teacher, self.teacher), SOLVERS[cfg.teacher_solver]
        times = denoiser.process.grid(cfg.teacher_steps)
        seed = seed_of(self.recipe.train.seed, "guards", "teacher")
        rng, count = torch.Generator().manual_seed(seed), len(self.prompts) * self.samples
        noise = torch.randn(count, *self.teacher.shape, generator=rng)
        torch.manual_seed(seed)  # stochastic solvers draw noise at each step
        parts = []
        for i in range(0, count, self.batch):
            rows = conditions.rows(self._cond, slice(i, i + self.batch))
            start = initial_state(denoiser, noise[i : i + self.batch].to(self.device), times)
            cond = conditions.moved(rows, self.device)
            parts.append(solver(denoiser, start, times.to(self.device), cond))
        return self._by_prompt(torch.cat(parts))

    def _pictures(self) -> Tensor | None:
        """The user's pictures beside the captions (N, ...), encoded; None if there are none."""
        files = pictures_beside(self.recipe.data.captions)
        if not files or self.recipe.data.source is not None:
            return None
        channels, *sides = picture_shape(self.teacher)
        read = [picture(Item(f.name, "", f.read_bytes), channels, *sides) for f in files]
        whole = [p.pixels for p in read if isinstance(p, Picture)]
        if not whole:
            return None
        images = signed(whole)
        pieces = images.split(images_at_once(self.teacher, *sides))
        encoded = [self.teacher.codec.encode(piece.to(self.device)).cpu() for piece in pieces]
        return torch.cat(encoded).float()


def pictures_beside(captions: str | None) -> list[Path]:
    """The images that lie beside the .txt files of a folder of captions, sorted."""
    folder = home(captions or "", "data.captions")
    if not captions or not folder.is_dir():
        return []
    texts = {p.stem for p in folder.iterdir() if p.suffix.lower() == ".txt"}
    files = (p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.stem in texts)
    return sorted(files)
