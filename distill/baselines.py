"""What a teacher does in few steps without any training: solvers, and schedules made for few steps.

Solvers are our own, or diffusers' schedulers in the teacher's stock pipeline. Schedules are the
process's own; those of Align Your Steps (arXiv:2404.14507), which its authors publish for three
teachers; or found here by dynamic programming, after GITS (arXiv:2405.11326).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import MinLen
from pydantic import model_validator
from torch import Tensor

from distill.measure import timed
from distill.objective import Count
from distill.recipe import Recipe, Section
from distill.teaching import guidance_of, guided
from eval.protocol import Draw, Protocol, images_to_samples
from eval.samples import Samples
from students.lora import unwrap
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError
from teachers.pipeline import Prompted
from teachers.process import Karras
from teachers.solver import SOLVERS, evaluations
from teachers.teacher import Teacher

# diffusers' schedulers, by the processes that they are written for
Stock = Literal["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                "DEISMultistepScheduler", "SASolverScheduler"]  # fmt: skip
StockEDM = Literal["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
AYS = {"StableDiffusionPipeline": "StableDiffusionSigmas",
       "StableDiffusionXLPipeline": "StableDiffusionXLSigmas"}  # fmt: skip
FINE = 64  # times that a schedule is chosen from
PATHS = 32  # trajectories on which its errors are measured
BATCH = 512


class Baseline(Section):
    """The teacher by one sampler, at several step counts."""

    solver: Literal["ddim", "euler", "heun", "dpmpp_2m", "ancestral"] | None = None  # our own
    scheduler: Stock | StockEDM | None = None  # diffusers' class, in the teacher's own pipeline
    steps: Annotated[tuple[Count, ...], MinLen(1)] = (1, 2, 4)
    schedule: Literal["own", "ays", "gits"] = "own"  # the times of our own solvers

    @model_validator(mode="after")
    def _agree(self) -> Baseline:
        if (self.solver is None) == (self.scheduler is None):
            raise ValueError("input should be a solver or a scheduler, one of the two")
        if self.scheduler is not None and self.schedule != "own":
            raise ValueError("input should have schedule: own, as schedulers choose their times")
        return self

    @property
    def name(self) -> str:
        """As tables have it."""
        if self.scheduler is not None:
            return f"diffusers {self.scheduler.removesuffix('Scheduler').removesuffix('Multistep')}"
        made = {"own": "", "ays": ", Align Your Steps", "gits": ", GITS"}[self.schedule]
        return f"{self.solver}{made}"

    def check(self, teacher: Teacher) -> None:
        """Refuse what this teacher cannot be sampled by, before anything is.

        Raises:
            UserError: the scheduler is of another process, or there is no such schedule for it.
        """
        where, karras = f"baselines: {self.name}", isinstance(teacher.denoiser.process, Karras)
        if self.scheduler is not None:
            known = get_args(StockEDM if karras else Stock)
            if self.scheduler not in known:
                raise UserError(
                    f"{where}: {teacher.source!r} is not of its process; known: {', '.join(known)}"
                )
            unwrap(teacher.denoiser)
        if self.schedule == "ays" and _family(teacher) not in AYS:
            raise UserError(
                f"{where}: its authors publish none for {teacher.source!r}; use schedule: gits"
            )

    def evaluations(self, steps: int) -> int:
        """Calls of the (guided) network for one picture."""
        return steps if self.solver is None else evaluations(steps, self.solver)

    def measure(
        self, recipe: Recipe, teacher: Teacher, measure: Protocol, steps: int, seeds: int
    ) -> dict[str, Any]:
        """The protocol's figures for the teacher in so many steps of this sampler."""
        return measure(self.draw(recipe, teacher, measure.prompts, steps), seeds)

    def draw(self, recipe: Recipe, teacher: Teacher, prompts: Sequence[Any], steps: int) -> Draw:
        """A way of drawing by this sampler; a schedule that is searched is so for these prompts."""
        if self.scheduler is not None:
            return lambda p, seed: self.stock(recipe, teacher, p, seed, steps)
        denoiser = guided(recipe, teacher)
        times = self.times(denoiser, teacher, prompts, steps)
        return lambda p, seed: self.solved(denoiser, teacher, p, seed, times)

    def times(
        self, denoiser: Denoiser, teacher: Teacher, prompts: Sequence[Any], steps: int
    ) -> Tensor:
        """When the network is called, from noise to data: (steps,) float64."""
        if self.schedule == "ays":
            return align_your_steps(teacher, steps)
        if self.schedule == "gits":
            z = torch.randn(PATHS, *teacher.shape, generator=torch.Generator().manual_seed(0))
            some = prompts[:: max(1, len(prompts) // PATHS)][:PATHS]
            cond = teacher.codec.condition(some)
            return searched(denoiser, z[: len(some)], steps, cond)
        return denoiser.process.grid(steps)

    @torch.no_grad()
    def solved(
        self, denoiser: Denoiser, teacher: Teacher, prompts: list[str], seed: int, times: Tensor
    ) -> Samples:
        """Pictures by one of our own solvers, from the noise that any other begins with."""
        assert self.solver is not None
        solver, device = SOLVERS[self.solver], _device(teacher)
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), *teacher.shape, generator=rng)
        cond = teacher.codec.condition(prompts)

        def make() -> Tensor:
            parts = []
            for i in range(0, len(noise), BATCH):
                part = cond and {k: v[i : i + BATCH].to(device) for k, v in cond.items()}
                x_t = begun(denoiser, noise[i : i + BATCH].to(device), times)
                parts.append(solver(denoiser, x_t, times.to(device), part))
            return torch.cat(parts)

        torch.manual_seed(seed)  # for solvers that draw noise on the way
        x, seconds = timed(make, device)
        return images_to_samples(teacher.codec.decode(x), prompts, seconds)

    @torch.no_grad()
    def stock(
        self, recipe: Recipe, teacher: Teacher, prompts: list[str], seed: int, steps: int
    ) -> Samples:
        """Pictures by the teacher's stock pipeline, with diffusers' scheduler in it."""
        assert self.scheduler is not None
        how = guidance_of(recipe)
        if how.kind != "cfg" or how.interval is not None or how.rescale:
            raise UserError(f"baselines: {self.name}: stock pipelines guide by kind cfg alone")
        pipe, device = pipeline(teacher, self.scheduler), _device(teacher)

        def make() -> Tensor:
            rng, parts = torch.Generator().manual_seed(seed), []
            for i in range(0, len(prompts), BATCH):
                asked = arguments(teacher, prompts[i : i + BATCH], how.scale)
                made = pipe(**asked, num_inference_steps=steps, generator=rng, output_type="pt")
                parts.append(made.images)
            return torch.cat(parts)

        images, seconds = timed(make, device)
        return images_to_samples(images * 2 - 1, prompts, seconds)


def pipeline(teacher: Teacher, scheduler: str) -> Any:
    """The teacher's own pipeline with another of diffusers' schedulers, set as its own was."""
    import diffusers

    network, kind = unwrap(teacher.denoiser), getattr(diffusers, scheduler)
    made = kind.from_config(network.schedule.config)
    if isinstance(teacher.codec, Prompted):
        parts = {**teacher.codec.pipe.components, "scheduler": made}
        pipe = type(teacher.codec.pipe)(**parts, requires_safety_checker=False)
    else:
        pipe = diffusers.ConsistencyModelPipeline(unet=network.backbone, scheduler=made)  # pyright: ignore
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(teacher: Teacher, prompts: list[str], scale: float) -> dict[str, Any]:
    """How the pipeline is asked for these prompts or labels, under classifier-free guidance."""
    if isinstance(teacher.codec, Prompted):
        return {**teacher.codec.arguments([*prompts]), "guidance_scale": scale}
    if scale != 1:
        raise UserError("baselines: the stock pipeline of labels has no guidance; use a solver")
    labels = [int(p) for p in prompts] if getattr(teacher.codec, "classes", 0) else None
    return {"batch_size": len(prompts), "class_labels": labels}


def align_your_steps(teacher: Teacher, steps: int) -> Tensor:
    """The published schedule of the teacher's family, its log σ interpolated to (steps,) times."""
    from diffusers.schedulers import AysSchedules

    sigmas = torch.tensor(AysSchedules[AYS[_family(teacher)]], dtype=torch.float64)
    sigmas = sigmas[sigmas > 0].log()  # σ/α; the 0 at the end is where the walk takes x̂
    where = torch.linspace(0, len(sigmas) - 1, steps, dtype=torch.float64)
    below = where.floor().long().clamp(max=len(sigmas) - 2)
    log_sigma = torch.lerp(sigmas[below], sigmas[below + 1], where - below)
    return teacher.denoiser.process.time(log_sigma.exp()).clamp(0, 1)


@torch.no_grad()
def searched(
    denoiser: Denoiser, z: Tensor, steps: int, cond: Cond = None, fine: int = FINE
) -> Tensor:
    """The times (steps,) among `fine` whose DDIM steps err least in sum, each from the true path.

    The error of a step is the mean distance of where it lands from the fine path there; it takes
    no further evaluation, as x̂ is known at all times of the path.

    Args:
        z: Unit noise (B, ...) that the paths begin with.

    Raises:
        UserError: there are more steps than times to choose from.
    """
    process = denoiser.process
    if steps > fine:
        raise UserError(f"baselines: gits: {steps} steps are more than the {fine} it chooses from")
    grid = process.grid(fine)
    device = z.device
    cond = cond and {k: v.to(device) for k, v in cond.items()}
    x_t, path, guesses = begun(denoiser, z, grid), [], []
    times = [t.to(z.dtype).expand(len(z)) for t in grid.to(device)]
    for t, s in zip(times, [*times[1:], None], strict=True):
        x = denoiser(x_t, t, cond)
        path.append(x_t)
        guesses.append(x)
        x_t = x if s is None else process.step(x_t, x, t, s)
    path.append(x_t)  # the end, which the last step reaches by taking x̂
    cost = torch.full((fine, fine + 1), torch.inf, dtype=torch.float64)
    for i, x in enumerate(guesses):
        for j in range(i + 1, fine + 1):
            landed = x if j == fine else process.step(path[i], x, times[i], times[j])
            cost[i, j] = (landed - path[j]).flatten(1).norm(dim=1).double().mean()
    return grid[cheapest(cost, steps)]


def cheapest(cost: Tensor, steps: int) -> list[int]:
    """The first `steps` nodes of the cheapest walk of so many steps from node 0 to the last.

    Args:
        cost: (N, N + 1), from each node to each later one; infinite to earlier ones.
    """
    n = len(cost)
    best = torch.full((steps + 1, n + 1), torch.inf, dtype=cost.dtype)
    came = torch.zeros(steps + 1, n + 1, dtype=torch.long)
    best[0, 0] = 0
    for k in range(steps):
        total = best[k, :n, None] + cost
        best[k + 1], came[k + 1] = total.min(0)
    nodes = [n]
    for k in range(steps, 0, -1):
        nodes.append(int(came[k, nodes[-1]]))
    return nodes[:0:-1]


def begun(denoiser: Denoiser, z: Tensor, times: Tensor) -> Tensor:
    """x_t at the first time, of data that are all zero and unit noise z (B, ...)."""
    start = times[:1].to(z.device, z.dtype).expand(len(z))
    return denoiser.process.noise(torch.zeros_like(z), start, z)


def _family(teacher: Teacher) -> str:
    """The class of the teacher's pipeline, where it has one."""
    return type(teacher.codec.pipe).__name__ if isinstance(teacher.codec, Prompted) else ""


def _device(teacher: Teacher) -> torch.device:
    parameters = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    return parameters[0].device
