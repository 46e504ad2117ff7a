"""Samplers of a teacher, with our solvers or with its stock pipeline; each counts its cost."""

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
from distill.profiling import Meter
from distill.sampling.guided_teacher import guidance_of, guided
from distill.sampling.student_sampler import decode, default_batch, timed
from distill.sampling.timesteps import (
    PATHS,
    SAMPLES,
    Truncated,
    align_your_steps,
    gits,
    initial_state,
    searched,
    truncated,
)
from eval.protocols.measure import Protocol, images_to_samples
from eval.samples import Samples
from students.architecture.units import check_units
from students.lora import unwrap
from teachers import conditions
from teachers.denoiser import Denoiser, Guided, computes
from teachers.families import unet
from teachers.families.base import Prompted, images_of, quiet
from teachers.guidance import Adaptive
from teachers.reduced.deepcache import DeepCache
from teachers.solver import SOLVERS
from teachers.teacher import Teacher


class Sampler(ABC):
    """Samples an image for each prompt, as protocols need it, and counts network evaluations.

    Args:
        denoiser: The networks in it are counted.
        cache: DeepCache's interval; 1 is no caching.
        batch: Images in one call of the networks; by default as many as their size allows.
        inherit: DeepCache's units.
    """

    def __init__(
        self,
        teacher: Teacher,
        denoiser: Denoiser,
        cache: int,
        batch: int | None,
        inherit: Sequence[str] = (),
    ) -> None:
        self.teacher, self.device = teacher, device_of(teacher)
        self.batch = batch or default_batch(teacher)
        self.networks = [m for m in denoiser.modules() if computes(m)]
        self.deep_cache: DeepCache | None = None
        if cache > 1:
            backbone = unwrap(teacher.denoiser).backbone
            check_units(backbone, inherit, "inherit")
            self.deep_cache = DeepCache(backbone, cache, units=inherit)
            self.shallow_share = shallow_share(teacher, inherit=inherit)
        self.search_evaluations = 0  # for computing the schedule

    @abstractmethod
    def sample(self, prompts: list[Any], seed: int) -> tuple[Tensor, float]:
        """Images (N, C, H, W) in [-1, 1], and the seconds of sampling."""

    @torch.no_grad()
    def __call__(self, prompts: list[Any], seed: int) -> Samples:
        before = 0 if self.deep_cache is None else self.deep_cache.shallow
        with counted(self.networks) as sizes:
            images, seconds = self.sample(prompts, seed)
        shallow = 0 if self.deep_cache is None else self.deep_cache.shallow - before
        costs = self.costs(sum(sizes), shallow, len(prompts))
        return images_to_samples(images, prompts, seconds)._replace(costs=costs)

    def caching(self) -> AbstractContextManager[Any]:
        """The context in which the sampler integrates one batch; DeepCache begins anew in it."""
        return nullcontext() if self.deep_cache is None else self.deep_cache

    def costs(self, evaluations: int, shallow: int, images: int) -> dict[str, float]:
        """Network evaluations of one image, and those that computed the schedule.

        A shallow evaluation counts as its share of a whole one's FLOPs; the numbers of whole and
        shallow evaluations are separate entries.
        """
        costs = {"evaluations": evaluations / images}
        if self.deep_cache is not None:
            costs = {
                "evaluations": (evaluations - shallow + self.shallow_share * shallow) / images,
                "whole_evaluations": (evaluations - shallow) / images,
                "shallow_evaluations": shallow / images,
            }
        if self.search_evaluations:
            costs["search_evaluations"] = float(self.search_evaluations)
        return costs


class SolverSampler(Sampler):
    """Samples with one of our solvers, from the noise that every other sampler starts with.

    A computed schedule serves all prompts; it is computed without `threshold` and `cache`.

    Args:
        prompts: A computed schedule is computed for some of these.
        threshold: The cosine of adaptive guidance; None for guidance in all steps.
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
        inherit: Sequence[str] = (),
    ) -> None:
        self.denoiser = guided(recipe.teacher, teacher)
        super().__init__(teacher, self.denoiser, cache, batch, inherit)
        self.solver, self.threshold = SOLVERS[solver], threshold
        with counted(self.networks) as sizes:
            self.times = self.schedule_times(schedule, steps, prompts)
        self.search_evaluations = sum(sizes)
        self.end = float(self.times[-1]) if schedule == "truncated" else None

    def schedule_times(self, schedule: str, steps: int, prompts: Sequence[Any]) -> Tensor:
        """The times of the network calls, from noise to data: (steps,) float64.

        A truncated schedule has one more, at which the chain stops.
        """
        if schedule == "ays":
            return align_your_steps(self.teacher, steps)
        if schedule == "truncated":
            return truncated(self.teacher, steps)
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

    def sample(self, prompts: list[Any], seed: int) -> tuple[Tensor, float]:
        rng, device, times = torch.Generator().manual_seed(seed), self.device, self.times
        noise = torch.randn(len(prompts), *self.teacher.shape, generator=rng)
        cond = self.teacher.codec.condition(prompts)

        def integrate() -> Tensor:
            parts = []
            for i in range(0, len(noise), self.batch):
                part = conditions.moved(conditions.rows(cond, slice(i, i + self.batch)), device)
                x_t = initial_state(self.denoiser, noise[i : i + self.batch].to(device), times)
                with self.caching():
                    parts.append(self.solver(self.batch_denoiser(), x_t, times.to(device), part))
            return torch.cat(parts)

        torch.manual_seed(seed)  # stochastic solvers draw noise at each step
        x, seconds = timed(integrate, device)
        return decode(self.teacher, x, self.batch), seconds

    def batch_denoiser(self) -> Denoiser:
        """The denoiser for one batch: adaptive guidance is stateful, so each batch has its own."""
        denoiser = self.denoiser
        if self.threshold is not None:
            assert isinstance(denoiser, Guided)
            denoiser = Adaptive(denoiser, self.threshold)
        return denoiser if self.end is None else Truncated(denoiser, self.end)


def recipe_sampler(recipe: Recipe, teacher: Teacher, steps: int) -> SolverSampler:
    """The sampler of the guided teacher with the recipe's solver."""
    return SolverSampler(recipe, teacher, recipe.eval.teacher_solver, "own", steps, [])


def evaluate_teacher(
    recipe: Recipe, teacher: Teacher, measure: Protocol, steps: int, seeds: int
) -> dict[str, Any]:
    """The protocol's figures of the guided teacher in `steps` steps of the recipe's solver."""
    figures = measure(recipe_sampler(recipe, teacher, steps), seeds)
    return {**figures, "solver": recipe.eval.teacher_solver, "steps": steps}


class PipelineSampler(Sampler):
    """Samples with the teacher's stock pipeline and a scheduler of diffusers."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        scheduler: str,
        steps: int,
        cache: int = 1,
        batch: int | None = None,
        inherit: Sequence[str] = (),
    ) -> None:
        super().__init__(teacher, teacher.denoiser, cache, batch, inherit)
        self.networks = [unwrap(teacher.denoiser).backbone]  # pipelines call the backbone directly
        self.scale, self.steps = guidance_of(recipe.teacher).one_scale, steps
        self.pipe = pipeline(teacher, scheduler)

    def sample(self, prompts: list[Any], seed: int) -> tuple[Tensor, float]:
        rng, parts = torch.Generator().manual_seed(seed), []

        def run() -> Tensor:
            for i in range(0, len(prompts), self.batch):
                words = arguments(self.teacher, prompts[i : i + self.batch], self.scale)
                words |= {"num_inference_steps": self.steps, "generator": rng}
                with self.caching():
                    output = self.pipe(**words, output_type="pt")
                parts.append(images_of(output).cpu())
            return torch.cat(parts)

        # a pipeline needs one device and one precision
        with quiet(), encoders_on(self.teacher, self.device), single_io(self.networks[0]):
            images, seconds = timed(run, self.device)
        return images * 2 - 1, seconds


@contextmanager
def single_io(network: nn.Module) -> Iterator[None]:
    """Let a half-precision network take and return single precision, as the other parts of a
    stock pipeline need. Timesteps are not cast, because half precision would round them."""
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
    """The teacher's pipeline with another scheduler of diffusers, configured as its own is."""
    import diffusers

    network, kind = unwrap(teacher.denoiser), getattr(diffusers, scheduler)
    other = kind.from_config(network.schedule.config)
    if isinstance(teacher.codec, Prompted):
        stock: Any = teacher.codec.pipe
        parts = {**stock.components, "scheduler": other}
        known = inspect.signature(type(stock).__init__).parameters
        settings = {k: v for k, v in stock.config.items() if k in known and k not in parts}
        pipe = type(stock)(**parts, **settings)
    else:
        pipe = unet.pipeline(teacher.codec, network.backbone, other)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(teacher: Teacher, prompts: list[str], scale: float) -> dict[str, Any]:
    """The pipeline's arguments for these prompts with classifier-free guidance, or for labels."""
    if isinstance(teacher.codec, Prompted):
        return {**teacher.codec.arguments([*prompts]), "guidance_scale": scale}
    labels = [int(p) for p in prompts] if teacher.codec.classes else None
    return {"batch_size": len(prompts), "class_labels": labels}


@contextmanager
def counted(networks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """A list that receives the batch size of every call of these networks."""
    sizes: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> None:
        batches = [v for v in (*args, *words.values()) if isinstance(v, Tensor | list)]
        sizes.append(len(batches[0]))

    hooks = [m.register_forward_pre_hook(count, with_kwargs=True) for m in networks]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def shallow_share(teacher: Teacher, feedback: Any = None, inherit: Sequence[str] = ()) -> float:
    """The FLOPs of a shallow call of the teacher's UNet, as a share of a whole call's.

    Args:
        feedback, inherit: As `DeepCache` takes feedback and units.
    """
    cond = teacher.codec.condition([0] if teacher.codec.classes else [""])
    device = device_of(teacher)
    cond = conditions.moved(cond, device)
    x, t, flops = torch.zeros(1, *teacher.shape, device=device), torch.ones(1, device=device), []
    with DeepCache(unwrap(teacher.denoiser).backbone, 2, feedback, inherit):
        for _ in ("whole", "shallow"):
            with Meter(set()) as meter:
                teacher.denoiser(x, t, cond)
            flops.append(meter.flops)
    return flops[1] / flops[0]


def device_of(teacher: Teacher) -> torch.device:
    parameters = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    return parameters[0].device
