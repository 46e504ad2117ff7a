"""What a teacher does in few steps without any training: solvers, and schedules made for few steps.

Solvers are our own, or diffusers' schedulers in the teacher's stock pipeline. Schedules are the
process's own, or one of `timesteps.py`. Guidance may stop early, and UNets may keep their deep
part from call to call: `teachers.guidance.Adaptive`, `teachers.deepcache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from annotated_types import MinLen
from pydantic import Field, model_validator

from distill.config.recipe import Recipe
from distill.config.schema import Section
from distill.field_types import PositiveInt
from distill.sampling.guided_teacher import guidance_of
from distill.sampling.teacher_sampler import PipelineSampler, Sampler, SolverSampler
from distill.sampling.timesteps import AYS, FINE, FOUND, enough, family
from eval.protocols.measure import Protocol
from students.lora import unwrap
from teachers.deepcache import deep_part
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.guidance import AGREED
from teachers.process import Karras
from teachers.teacher import Teacher

# diffusers' schedulers, by the processes that they are written for
Stock = Literal["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                "DEISMultistepScheduler", "SASolverScheduler"]  # fmt: skip
StockEDM = Literal["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
Schedule = Literal["own", "ays", "gits", "searched"]
MADE = {"own": "", "ays": ", Align Your Steps", "gits": ", GITS", "searched": ", searched"}


class Baseline(Section):
    """The teacher by one sampler, at several step counts."""

    solver: Literal["ddim", "euler", "heun", "dpmpp_2m", "ancestral"] | None = None  # our own
    scheduler: Stock | StockEDM | None = None  # diffusers' class, in the own pipeline
    steps: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (1, 2, 4)
    schedule: Schedule = "own"  # the times of our own solvers
    guidance: Literal["full", "adaptive"] = "full"  # adaptive: until both predictions agree
    threshold: Annotated[float, Field(gt=0, le=1)] = AGREED  # the cosine at which they do
    cache: PositiveInt = 1  # DeepCache: calls of a UNet from one whole call to the next; 1 is none

    @model_validator(mode="after")
    def _agree(self) -> Baseline:
        if (self.solver is None) == (self.scheduler is None):
            raise ValueError("input should be a solver or a scheduler, one of the two")
        if self.scheduler is not None and self.schedule != "own":
            raise ValueError("input should have schedule: own, as schedulers choose their times")
        if self.scheduler is not None and self.guidance != "full":
            raise ValueError("input should have guidance: full, as stock pipelines guide all steps")
        if self.guidance != "full" and self.cache > 1:
            raise ValueError("input should have cache: 1, as adaptive guidance changes the batch")
        return self

    @property
    def name(self) -> str:
        """As tables have it."""
        made = f"{self.solver}{MADE[self.schedule]}"
        if self.scheduler is not None:
            made = f"diffusers {self.scheduler.removesuffix('Scheduler').removesuffix('Multistep')}"
        if self.guidance == "adaptive":
            made += ", adaptive guidance"
            made += "" if self.threshold == AGREED else f" {self.threshold:g}"
        return made if self.cache == 1 else f"{made}, DeepCache {self.cache}"

    def check(self, recipe: Recipe, teacher: Teacher, where: str = "") -> None:
        """Refuse what this teacher cannot be sampled by, before anything is.

        Args:
            where: What messages begin with; by default as a benchmark's.

        Raises:
            UserError: the scheduler is of another process, there is no such schedule for it, it is
                not guided in a way that can stop, or its network has no deep part to keep.
        """
        where, how = where or f"baselines: {self.name}", guidance_of(recipe.teacher)
        if self.scheduler is not None:
            karras = isinstance(teacher.denoiser.process, Karras)
            known = get_args(StockEDM if karras else Stock)
            if self.scheduler not in known:
                raise UserError(
                    f"{where}: {teacher.source!r} is not of its process; known: {', '.join(known)}"
                )
            unwrap(teacher.denoiser)
            if how.kind != "cfg" or how.interval is not None or how.rescale:
                raise UserError(f"{where}: stock pipelines guide by kind cfg alone")
            if how.scale != 1 and not isinstance(teacher.codec, Prompted):
                raise UserError(f"{where}: the stock pipeline of labels has no guidance")
        if self.schedule == "ays" and family(teacher) not in AYS:
            raise UserError(
                f"{where}: its authors publish none for {teacher.source!r}; use schedule: gits"
            )
        if self.schedule in FOUND:
            enough(max(self.steps), FINE, where)
        if self.guidance == "adaptive" and how.scale == 1:
            raise UserError(f"{where}: guidance is 1, and there is nothing to stop")
        changing = self.guidance == "adaptive" or self.cache > 1
        if changing and (how.kind not in ("cfg", "apg") or how.interval is not None):
            raise UserError(f"{where}: guidance must be of kind cfg or apg, without an interval")
        if self.cache > 1:
            try:
                deep_part(unwrap(teacher.denoiser).backbone)
            except UserError as error:
                raise UserError(f"{where}: {teacher.source!r}: {error}; leave cache out") from None

    def measure(
        self, recipe: Recipe, teacher: Teacher, measure: Protocol, steps: int, seeds: int
    ) -> dict[str, Any]:
        """The protocol's figures for the teacher in so many steps of this sampler, and its cost."""
        return measure(self.draw(recipe, teacher, measure.prompts, steps), seeds)

    def draw(
        self,
        recipe: Recipe,
        teacher: Teacher,
        prompts: Sequence[Any],
        steps: int,
        batch: int | None = None,
    ) -> Sampler:
        """A way of drawing by this sampler; a schedule that is found is found for these prompts.

        Args:
            batch: How many go through the networks at once; by default what their size allows.
        """
        if self.scheduler is not None:
            return PipelineSampler(recipe, teacher, self.scheduler, steps, self.cache, batch)
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
        )
