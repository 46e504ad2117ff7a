"""Ways of drawing a teacher's pictures without training, each of which knows what it has cost."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.data.encode import encoders_on
from distill.profiling import Meter, evaluations_of
from distill.sampling.guided_teacher import guidance_of, guided
from distill.sampling.student_sampler import at_once, decoded, timed
from distill.sampling.timesteps import PATHS, SAMPLES, align_your_steps, begun, gits, searched
from eval.protocols.measure import Protocol, images_to_samples
from eval.samples import Samples
from students.lora import unwrap
from teachers import conditions
from teachers.deepcache import DeepCache
from teachers.denoiser import Denoiser, Guided, computes
from teachers.families.base import Prompted, images_of, quiet
from teachers.guidance import Adaptive
from teachers.solver import SOLVERS
from teachers.teacher import Teacher


class Sampler(ABC):
    """Draws a picture for each prompt, as a protocol asks for them, and counts.

    Args:
        denoiser: Whose networks are counted: all that a picture takes.
        cache: DeepCache's interval.
        batch: How many go through the networks at once; by default what their size allows.
    """

    def __init__(self, teacher: Teacher, denoiser: Denoiser, cache: int, batch: int | None) -> None:
        self.teacher, self.device = teacher, device_of(teacher)
        self.batch = batch or at_once(teacher)
        self.networks = [m for m in denoiser.modules() if computes(m)]
        self.kept: DeepCache | None = None
        if cache > 1:
            self.kept = DeepCache(unwrap(teacher.denoiser).backbone, cache)
            self.part = shallow_part(teacher)
        self.searching = 0  # evaluations that finding a schedule took

    @abstractmethod
    def make(self, prompts: list[Any], seed: int) -> tuple[Tensor, float]:
        """Pictures in [-1, 1], and the seconds that they took."""

    @torch.no_grad()
    def __call__(self, prompts: list[Any], seed: int) -> Samples:
        before = 0 if self.kept is None else self.kept.shallow
        with evaluations_of({"teacher": self.networks}) as samples:
            images, seconds = self.make(prompts, seed)
        shallow = 0 if self.kept is None else self.kept.shallow - before
        costs = self.costs(samples["teacher"], shallow, len(prompts))
        return images_to_samples(images, prompts, seconds)._replace(costs=costs)

    def walk(self) -> AbstractContextManager[Any]:
        """What one walk of one batch is made in."""
        return nullcontext() if self.kept is None else self.kept

    def costs(self, evaluations: int, shallow: int, pictures: int) -> dict[str, float]:
        """Network evaluations of a picture, and of finding its times.

        A shallow evaluation counts for its part of a whole one's FLOPs; how many there were of
        either is told beside it.
        """
        found = {"evaluations": evaluations / pictures}
        if self.kept is not None:
            found = {
                "evaluations": (evaluations - shallow + self.part * shallow) / pictures,
                "whole_evaluations": (evaluations - shallow) / pictures,
                "shallow_evaluations": shallow / pictures,
            }
        return found | ({"search_evaluations": float(self.searching)} if self.searching else {})


class SolverSampler(Sampler):
    """By one of our own solvers, from the noise that any other begins with.

    Schedules are found for all that is drawn, without `threshold` and `cache`.

    Args:
        prompts: That a schedule is found for, by some of them.
        threshold: Of adaptive guidance; None for guidance in all steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        solver: str,
        schedule: str,
        steps: int,
        prompts: Sequence[Any],
        threshold: float | None = None,
        cache: int = 1,
        batch: int | None = None,
    ) -> None:
        self.denoiser = guided(recipe.teacher, teacher)
        super().__init__(teacher, self.denoiser, cache, batch)
        self.solver, self.threshold = SOLVERS[solver], threshold
        with evaluations_of({"teacher": self.networks}) as samples:
            self.times = self.found(schedule, steps, prompts)
        self.searching = samples["teacher"]

    def found(self, schedule: str, steps: int, prompts: Sequence[Any]) -> Tensor:
        """When the network is called, from noise to data: (steps,) float64."""
        if schedule == "ays":
            return align_your_steps(self.teacher, steps)
        if schedule == "own":
            return self.denoiser.process.grid(steps)
        count = PATHS if schedule == "gits" else SAMPLES
        some = prompts[:: max(1, len(prompts) // count)][:count]
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(count, *self.teacher.shape, generator=rng)[: len(some)].to(self.device)
        cond = self.teacher.codec.condition(some)
        if schedule == "gits":
            return gits(self.denoiser, z, steps, cond)
        return searched(self.solver, self.denoiser, z, steps, cond)

    def make(self, prompts: list[Any], seed: int) -> tuple[Tensor, float]:
        rng, device, times = torch.Generator().manual_seed(seed), self.device, self.times
        noise = torch.randn(len(prompts), *self.teacher.shape, generator=rng)
        cond = self.teacher.codec.condition(prompts)

        def draw() -> Tensor:
            parts = []
            for i in range(0, len(noise), self.batch):
                part = conditions.moved(conditions.rows(cond, slice(i, i + self.batch)), device)
                x_t = begun(self.denoiser, noise[i : i + self.batch].to(device), times)
                with self.walk():
                    parts.append(self.solver(self.walked(), x_t, times.to(device), part))
            return torch.cat(parts)

        torch.manual_seed(seed)  # for solvers that draw noise on the way
        x, seconds = timed(draw, device)
        return decoded(self.teacher, x, self.batch), seconds

    def walked(self) -> Denoiser:
        """The denoiser of one walk."""
        if self.threshold is None:
            return self.denoiser
        assert isinstance(self.denoiser, Guided)
        return Adaptive(self.denoiser, self.threshold)


def own(recipe: Recipe, teacher: Teacher, steps: int) -> SolverSampler:
    """The guided teacher by the recipe's own solver."""
    return SolverSampler(recipe, teacher, recipe.eval.teacher_solver, "own", steps, [])


def evaluate_teacher(
    recipe: Recipe, teacher: Teacher, measure: Protocol, steps: int, seeds: int
) -> dict[str, Any]:
    """The guided teacher in `steps` steps of the recipe's solver, by the protocol."""
    found = measure(own(recipe, teacher, steps), seeds)
    return {**found, "solver": recipe.eval.teacher_solver, "steps": steps}


class PipelineSampler(Sampler):
    """By the teacher's stock pipeline, with diffusers' scheduler in it."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        scheduler: str,
        steps: int,
        cache: int = 1,
        batch: int | None = None,
    ) -> None:
        super().__init__(teacher, teacher.denoiser, cache, batch)
        self.networks = [unwrap(teacher.denoiser).backbone]  # which pipelines call themselves
        self.scale, self.steps = guidance_of(recipe.teacher).scale, steps
        self.pipe = pipeline(teacher, scheduler)

    def make(self, prompts: list[Any], seed: int) -> tuple[Tensor, float]:
        rng, parts = torch.Generator().manual_seed(seed), []

        def draw() -> Tensor:
            for i in range(0, len(prompts), self.batch):
                asked = arguments(self.teacher, prompts[i : i + self.batch], self.scale)
                with self.walk():
                    made = self.pipe(
                        **asked, num_inference_steps=self.steps, generator=rng, output_type="pt"
                    )
                parts.append(images_of(made).cpu())
            return torch.cat(parts)

        # a pipeline is on one device, and in one precision
        with quiet(), encoders_on(self.teacher, self.device), in_single(self.networks[0]):
            images, seconds = timed(draw, self.device)
        return images * 2 - 1, seconds


@contextmanager
def in_single(network: nn.Module) -> Iterator[None]:
    """Within it, a network of half precision is given and gives single, as the rest of a pipeline
    that is not made for mixed ones takes it. Times, which would be rounded, are left alone."""
    dtype = next(network.parameters()).dtype
    if dtype == torch.float32:
        yield
        return

    def cast(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(to) if value.is_floating_point() and value.ndim > 1 else value
        if isinstance(value, dict):
            return {k: cast(v, to) for k, v in value.items()}
        return tuple(cast(v, to) for v in value) if type(value) is tuple else value

    hooks = [
        network.register_forward_pre_hook(
            lambda _, args, kwargs: (cast(args, dtype), cast(kwargs, dtype)), with_kwargs=True
        ),
        network.register_forward_hook(lambda _, args, out: cast(out, torch.float32)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pipeline(teacher: Teacher, scheduler: str) -> Any:
    """The teacher's own pipeline with another of diffusers' schedulers, set as its own was."""
    import diffusers

    network, kind = unwrap(teacher.denoiser), getattr(diffusers, scheduler)
    made = kind.from_config(network.schedule.config)
    if isinstance(teacher.codec, Prompted):
        parts = {**teacher.codec.pipe.components, "scheduler": made}
        before: Any = teacher.codec.pipe
        known = inspect.signature(type(before).__init__).parameters
        settings = {k: v for k, v in before.config.items() if k in known and k not in parts}
        pipe = type(before)(**parts, **settings)
    else:
        pipe = diffusers.ConsistencyModelPipeline(unet=network.backbone, scheduler=made)  # pyright: ignore
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(teacher: Teacher, prompts: list[str], scale: float) -> dict[str, Any]:
    """How the pipeline is asked for these prompts, under classifier-free guidance, or labels."""
    if isinstance(teacher.codec, Prompted):
        return {**teacher.codec.arguments([*prompts]), "guidance_scale": scale}
    labels = [int(p) for p in prompts] if getattr(teacher.codec, "classes", 0) else None
    return {"batch_size": len(prompts), "class_labels": labels}


@torch.no_grad()
def shallow_part(teacher: Teacher) -> float:
    """The FLOPs of a shallow call of the teacher's UNet over those of a whole one."""
    cond = teacher.codec.condition([0] if getattr(teacher.codec, "classes", 0) else [""])
    device = device_of(teacher)
    cond = conditions.moved(cond, device)
    x, t, flops = torch.zeros(1, *teacher.shape, device=device), torch.ones(1, device=device), []
    with DeepCache(unwrap(teacher.denoiser).backbone, 2):
        for _ in ("whole", "shallow"):
            with Meter(set()) as meter:
                teacher.denoiser(x, t, cond)
            flops.append(meter.flops)
    return flops[1] / flops[0]


def device_of(teacher: Teacher) -> torch.device:
    parameters = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    return parameters[0].device
