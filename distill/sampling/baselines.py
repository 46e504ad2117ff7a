"""Few-step samplers of a teacher that need no training.

A baseline uses one of our own solvers, or a scheduler of diffusers in the teacher's stock pipeline.
Its schedule is the process's own, or one of `timesteps.py`. Guidance may stop early
(`teachers.guidance.Adaptive`), and a UNet may reuse its deep part from call to call
(`teachers.reduced.deepcache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import MinLen
from pydantic import Field, model_validator

from distill.config.recipe import Recipe
from distill.config.schema import GuidanceSection, Name, Section
from distill.field_types import PositiveInt
from distill.sampling.guided_teacher import guidance_of
from distill.sampling.teacher_sampler import PipelineSampler, Sampler, SolverSampler
from distill.sampling.timesteps import (
    AYS,
    COMPUTED,
    FINE_STEPS,
    TRUNCATED,
    check_steps,
    pipeline_class,
)
from eval.protocols.measure import Protocol
from students.architecture.units import check_units
from students.lora import unwrap
from teachers.errors import UserError, plural
from teachers.families.base import Prompted
from teachers.guidance import AGREED
from teachers.process import Karras
from teachers.reduced.deepcache import DeepCache
from teachers.solver import is_pure_noise
from teachers.teacher import Teacher

# diffusers' schedulers, by the process that they support
Stock = Literal["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                "DEISMultistepScheduler", "SASolverScheduler"]  # fmt: skip
StockEDM = Literal["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
Schedule = Literal["own", "ays", "gits", "searched", "truncated"]
SCHEDULE_NAMES = {
    "own": "",
    "ays": ", Align Your Steps",
    "gits": ", GITS",
    "searched": ", searched",
    "truncated": ", truncated",
}
STOPPABLE = ("ddim", "dpmpp_2m")  # solvers that never look beyond the time where a step lands


class Baseline(Section):
    """The teacher with one sampler, at several step counts."""

    solver: Literal["ddim", "euler", "heun", "dpmpp_2m", "ancestral"] | None = None  # one of ours
    scheduler: Stock | StockEDM | None = None  # a class of diffusers, in the teacher's pipeline
    steps: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (1, 2, 4)
    schedule: Schedule = "own"  # the times of our solvers
    guidance: Literal["full", "adaptive"] = "full"  # adaptive: stop when both predictions agree
    threshold: Annotated[float, Field(gt=0, le=1)] = AGREED  # their cosine at which guidance stops
    cache: PositiveInt = 1  # DeepCache: run the whole UNet at every n-th call; 1 is always
    inherit: tuple[Name, ...] = ()  # with cache: layers that are kept, not all inner levels

    @model_validator(mode="after")
    def _agree(self) -> Baseline:
        if (self.solver is None) == (self.scheduler is None):
            raise ValueError("input should be a solver or a scheduler, one of the two")
        if self.scheduler is not None and self.schedule != "own":
            raise ValueError(
                "input should have schedule: own, because schedulers choose their own times"
            )
        if self.scheduler is not None and self.guidance != "full":
            raise ValueError(
                "input should have guidance: full, because stock pipelines guide all steps"
            )
        if self.inherit and self.cache == 1:
            raise ValueError("input should have cache: 2 or more with inherit")
        if self.guidance != "full" and self.cache > 1:
            raise ValueError(
                "input should have cache: 1, because adaptive guidance changes the batch"
            )
        return self

    @property
    def name(self) -> str:
        """Its name in tables."""
        name = f"{self.solver}{SCHEDULE_NAMES[self.schedule]}"
        if self.scheduler is not None:
            name = f"diffusers {self.scheduler.removesuffix('Scheduler').removesuffix('Multistep')}"
        if self.guidance == "adaptive":
            name += ", adaptive guidance"
            name += "" if self.threshold == AGREED else f" {self.threshold:g}"
        if self.inherit:
            count = len(self.inherit)
            return f"{name}, {count} {plural(count, 'layer')} inherited {self.cache}"
        return name if self.cache == 1 else f"{name}, DeepCache {self.cache}"

    def check(self, recipe: Recipe, teacher: Teacher, where: str = "") -> None:
        """Refuse a teacher that this sampler cannot sample, before anything is sampled.

        Args:
            where: The beginning of messages; by default a benchmark's key.

        Raises:
            UserError: the scheduler is for another process, the schedule does not exist for this
                teacher, its guidance cannot stop, or its network has no deep part to reuse.
        """
        where = where or f"baselines: {self.name}"
        guidance = guidance_of(recipe.teacher)
        if self.scheduler is not None:
            self._check_pipeline(teacher, guidance, where)
        self._check_schedule(teacher, where)
        self._check_adaptive(guidance, where)
        if self.cache > 1:
            try:
                check_units(unwrap(teacher.denoiser).backbone, self.inherit, "inherit")
                DeepCache(unwrap(teacher.denoiser).backbone, self.cache, units=self.inherit)
            except UserError as error:
                raise UserError(f"{where}: {teacher.source!r}: {error}") from None

    def _check_pipeline(self, teacher: Teacher, guidance: GuidanceSection, where: str) -> None:
        karras = isinstance(teacher.denoiser.process, Karras)
        known = get_args(StockEDM if karras else Stock)
        if self.scheduler not in known:
            raise UserError(
                f"{where}: this scheduler does not fit the process of {teacher.source!r}; "
                f"known: {', '.join(known)}"
            )
        if unwrap(teacher.denoiser).share_times is not None:
            raise UserError(
                f"{where}: stock pipelines pass the network every time, and this teacher reads "
                "some as one (teacher.share_times); use a solver"
            )
        if guidance.kind != "cfg" or guidance.interval is not None or guidance.rescale:
            raise UserError(
                f"{where}: stock pipelines support guidance of kind cfg only, without interval "
                "and rescale; use a solver"
            )
        if guidance.one_scale != 1 and not isinstance(teacher.codec, Prompted):
            raise UserError(
                f"{where}: the stock pipeline for class labels has no guidance; use a solver"
            )

    def _check_schedule(self, teacher: Teacher, where: str) -> None:
        if self.schedule == "ays" and pipeline_class(teacher) not in AYS:
            raise UserError(
                f"{where}: Align Your Steps publishes no schedule for {teacher.source!r}; "
                "use schedule: gits"
            )
        if self.schedule == "truncated":
            self._check_truncated(teacher, where)
        if self.schedule in COMPUTED:
            check_steps(max(self.steps), FINE_STEPS, where)

    def _check_truncated(self, teacher: Teacher, where: str) -> None:
        if impossible := [n for n in self.steps if n not in TRUNCATED]:
            raise UserError(
                f"{where}: {impossible[0]} steps; truncated schedules are published for "
                f"{', '.join(map(str, TRUNCATED))}; give one of these"
            )
        if self.solver not in STOPPABLE:
            raise UserError(
                f"{where}: {self.solver} cannot stop at a noise level; use ddim, as published for "
                "5 and 6 steps, or dpmpp_2m, for 8"
            )
        if is_pure_noise(teacher.denoiser.process, torch.ones(1)):
            raise UserError(
                f"{where}: the process of {teacher.source!r} begins at pure noise, for which no "
                "truncated schedule is published; use schedule: gits"
            )

    def _check_adaptive(self, guidance: GuidanceSection, where: str) -> None:
        adaptive = self.guidance == "adaptive"
        if adaptive and guidance.one_scale == 1:
            raise UserError(
                f"{where}: adaptive guidance needs a scale other than 1; raise teacher.guidance"
            )
        plain = guidance.kind in ("cfg", "apg") and guidance.interval is None
        if (adaptive or self.cache > 1) and not plain:
            raise UserError(f"{where}: expected guidance of kind cfg or apg, without an interval")

    def measure(
        self, recipe: Recipe, teacher: Teacher, measure: Protocol, steps: int, seeds: int
    ) -> dict[str, Any]:
        """The protocol's figures of the teacher in `steps` steps of this sampler, and its cost."""
        return measure(self.sampler(recipe, teacher, measure.prompts, steps), seeds)

    def sampler(
        self,
        recipe: Recipe,
        teacher: Teacher,
        prompts: Sequence[Any],
        steps: int,
        batch: int | None = None,
    ) -> Sampler:
        """The sampler of this teacher in `steps` steps.

        Args:
            prompts: Those that a computed schedule is computed for.
            batch: Samples in one call of the networks; by default as many as their size allows.
        """
        if self.scheduler is not None:
            return PipelineSampler(
                recipe, teacher, self.scheduler, steps, self.cache, batch, self.inherit
            )
        assert self.solver is not None
        threshold = self.threshold if self.guidance == "adaptive" else None
        return SolverSampler(
            recipe,
            teacher,
            self.solver,
            self.schedule,
            steps,
            prompts,
            threshold,
            self.cache,
            batch,
            self.inherit,
        )
