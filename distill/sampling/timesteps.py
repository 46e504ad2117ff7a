"""Few-step timestep schedules for teachers: published ones, and two that are computed here.

| paper | here |
|---|---|
| Align Your Steps, arXiv:2404.14507 | `align_your_steps`, as its authors publish it |
| GITS, arXiv:2405.11326 | `gits`: minimises the sum of single-step errors, by dynamic programming |
| AutoDiffusion, arXiv:2309.10438 | `searched`: minimises a distance of samples, by evolution |
| Hyperparameters are all you need, arXiv:2510.02390 | `truncated`: fixed; ends at a noise level |

AutoDiffusion minimises the FID of a candidate's images to real ones, and prunes layers too. This
search changes times only, and its objective is the energy distance, in data space, of samples to
the teacher's own samples in many steps. That distance needs neither data nor a feature network, is
zero for equal distributions only, and is not the metric that evaluates the schedule afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from teachers import conditions
from teachers.denoiser import Cond, Denoiser, Wrapper
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.teacher import Teacher

Solver = Callable[[Denoiser, Tensor, Tensor, Cond], Tensor]  # of x_t (B, ...) and times (n,)
Nodes = tuple[int, ...]

AYS = {"StableDiffusionPipeline": "StableDiffusionSigmas",
       "StableDiffusionXLPipeline": "StableDiffusionXLSigmas"}  # fmt: skip
# Of truncated schedules, by step count: the levels and ρ of a grid of noise levels, and which of
# them is the last, as the authors' code has them for Stable Diffusion 1.5 and for SDXL.
TRUNCATED = {4: (8, 5.0, 5), 5: (8, 5.0, 6), 6: (8, 5.0, 6), 8: (12, 7.0, 9)}
TRUNCATED_SDXL = {4: (8, 5.0, 6), 5: (8, 5.0, 6), 6: (8, 5.0, 6), 8: (12, 12.0, 10)}
TRUNCATED_RHO = 1.2  # t^(1/ρ) is even between the first and the last
COMPUTED = ("gits", "searched")  # the schedules that are computed here, for given prompts
FINE_STEPS = 64  # times that a schedule is chosen from
PATHS = 32  # trajectories on which GITS measures errors
# A search samples at most POPULATION + GENERATIONS * (POPULATION - PARENTS) times SAMPLES items,
# and the fine trajectories of SAMPLES and of PATHS items.
SAMPLES = 64  # compared between a candidate and the teacher
POPULATION = 12  # candidates in a generation
PARENTS = 4  # the best of them, which stay and have offspring
GENERATIONS = 10
REACH = 4  # positions, of about FINE_STEPS, by which a mutation may move a time


def align_your_steps(teacher: Teacher, steps: int) -> Tensor:
    """The published schedule of the teacher's family, its log σ interpolated to (steps,) times."""
    from diffusers.schedulers import AysSchedules

    sigmas = torch.tensor(AysSchedules[AYS[pipeline_class(teacher)]], dtype=torch.float64)
    sigmas = sigmas[sigmas > 0].log()  # σ/α; at the final 0 the solver returns x̂
    position = torch.linspace(0, len(sigmas) - 1, steps, dtype=torch.float64)
    below = position.floor().long().clamp(max=len(sigmas) - 2)
    log_sigma = torch.lerp(sigmas[below], sigmas[below + 1], position - below)
    return teacher.denoiser.process.time(log_sigma.exp()).clamp(0, 1)


def truncated(teacher: Teacher, steps: int) -> Tensor:
    """The times (steps + 1,) of the fixed schedule for few steps (arXiv:2510.02390).

    The last one is where the samples stay: with noise of that level, which the authors found better
    than none. `Truncated` stops a solver there. Their code's FreeU and noise network are not here.

    Raises:
        KeyError: there is no such schedule for this number of steps.
    """
    sdxl = pipeline_class(teacher) == "StableDiffusionXLPipeline"
    levels, rho, last = (TRUNCATED_SDXL if sdxl else TRUNCATED)[steps]
    process = teacher.denoiser.process
    alpha, sigma = process.scales(torch.tensor([1.0, 0.0], dtype=torch.float64))
    high, low = (sigma / alpha) ** (1 / rho)
    start, end = process.time((high + torch.tensor([0, last]) / (levels - 1) * (low - high)) ** rho)
    roots = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    first, final = start ** (1 / TRUNCATED_RHO), end ** (1 / TRUNCATED_RHO)
    return (final + roots * (first - final)) ** TRUNCATED_RHO


class Truncated(Wrapper):
    """A denoiser that, at one time, takes a sample for denoised: a solver ends there.

    Args:
        end: That time, the last of a solver's.
    """

    def __init__(self, denoiser: Denoiser, end: float) -> None:
        super().__init__(denoiser)
        self.end = end

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        if t[0].item() < self.end + 1e-6:  # a solver's samples are all at one time, in its type
            return x_t / self.process.at(t, x_t)[0]
        return self.denoiser(x_t, t, cond, s)


@torch.no_grad()
def gits(
    denoiser: Denoiser, z: Tensor, steps: int, cond: Cond = None, fine_steps: int = FINE_STEPS
) -> Tensor:
    """The times (steps,) of a fine grid with the least sum of DDIM errors from the fine trajectory.

    The error of a step is the mean distance between its result and the fine trajectory there. It
    needs no further evaluation, because x̂ is known at every time of the trajectory.

    Args:
        z: Unit noise (B, ...) at the start of the trajectories.
        fine_steps: The size of the grid.

    Raises:
        UserError: `steps` exceeds `fine_steps`.
    """
    process = denoiser.process
    check_steps(steps, fine_steps)
    grid, device = process.grid(fine_steps), z.device
    cond = conditions.moved(cond, device)
    x_t, path, predictions = initial_state(denoiser, z, grid), [], []
    times = [t.to(z.dtype).expand(len(z)) for t in grid.to(device)]
    for t, s in zip(times, [*times[1:], None], strict=True):
        x = denoiser(x_t, t, cond)
        path.append(x_t)
        predictions.append(x)
        x_t = x if s is None else process.step(x_t, x, t, s)
    path.append(x_t)  # the end: the last step returns x̂
    cost = torch.full((fine_steps, fine_steps + 1), torch.inf, dtype=torch.float64)
    for i, x in enumerate(predictions):
        for j in range(i + 1, fine_steps + 1):
            end = x if j == fine_steps else process.step(path[i], x, times[i], times[j])
            cost[i, j] = (end - path[j]).flatten(1).norm(dim=1).double().mean()
    return grid[cheapest_path(cost, steps)]


def cheapest_path(cost: Tensor, steps: int) -> list[int]:
    """The first `steps` nodes of the cheapest path of that many steps from node 0 to the last.

    Args:
        cost: (N, N + 1), from each node to each later one; infinite to earlier ones.
    """
    n = len(cost)
    best = torch.full((steps + 1, n + 1), torch.inf, dtype=cost.dtype)
    previous = torch.zeros(steps + 1, n + 1, dtype=torch.long)
    best[0, 0] = 0
    for k in range(steps):
        total = best[k, :n, None] + cost
        best[k + 1], previous[k + 1] = total.min(0)
    nodes = [n]
    for k in range(steps, 0, -1):
        nodes.append(int(previous[k, nodes[-1]]))
    return nodes[:0:-1]


@torch.no_grad()
def searched(
    solver: Solver,
    denoiser: Denoiser,
    z: Tensor,
    steps: int,
    cond: Cond = None,
    fine_steps: int = FINE_STEPS,
) -> Tensor:
    """The times (steps,) whose samples are nearest in distribution to those on a fine grid.

    Candidates consist of the fine times and of the process's own times for `steps`. The search
    starts with the process's own schedule and with GITS's, so the result is never farther than
    either by the distance that it minimises.

    Args:
        z: Unit noise (B, ...), the same for all candidates.
        fine_steps: The size of the grid.

    Raises:
        UserError: `steps` exceeds `fine_steps`.
    """
    check_steps(steps, fine_steps)
    process, cond = denoiser.process, conditions.moved(cond, z.device)
    grid, default = process.grid(fine_steps), process.grid(steps)
    few = conditions.rows(cond, slice(None, PATHS))
    by_gits = gits(denoiser, z[:PATHS], steps, few, fine_steps)
    choices = torch.cat([grid, default]).unique().flip(0)

    def samples(times: Tensor) -> Tensor:
        with torch.random.fork_rng([z.device] if z.is_cuda else []):
            torch.manual_seed(0)  # stochastic solvers draw noise at each step
            return solver(denoiser, initial_state(denoiser, z, times), times.to(z.device), cond)

    target = samples(grid)

    def distance(nodes: Nodes) -> float:
        value = energy_distance(samples(choices[list(nodes)]), target)
        return math.inf if math.isnan(value) else value  # a solver may diverge on uneven steps

    initial = [
        tuple(torch.isin(choices, times).nonzero()[:, 0].tolist()) for times in (default, by_gits)
    ]
    return choices[list(evolve(distance, initial, len(choices)))]


def evolve(distance: Callable[[Nodes], float], founders: list[Nodes], n: int) -> Nodes:
    """The best subset of range(n) that evolution finds; all begin at 0 and have the same length.

    The result is deterministic. Each subset is measured once.
    """
    if len(founders[0]) == 1:
        return founders[0]
    rng = Random(0)
    known = {nodes: distance(nodes) for nodes in founders}
    population = list(known)
    for _ in range(GENERATIONS):
        parents = sorted(population, key=known.__getitem__)[:PARENTS]
        population = list(parents)
        while len(population) < POPULATION:
            nodes = offspring(rng.choice(parents), rng.choice(parents), n, rng)
            if nodes not in known:
                known[nodes] = distance(nodes)
            population.append(nodes)
    return min(known, key=known.__getitem__)


def offspring(a: Nodes, b: Nodes, n: int, rng: Random) -> Nodes:
    """Crossover and mutation: a subset of both parents' nodes, one of them moved within REACH."""
    nodes = set(rng.sample(sorted({*a, *b} - {0}), len(a) - 1))
    node = rng.choice(sorted(nodes))
    near = range(max(1, node - REACH), min(n, node + REACH + 1))
    if free := [i for i in near if i not in nodes]:
        nodes = nodes - {node} | {rng.choice(free)}
    return (0, *sorted(nodes))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """An unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| from x and y (N, ...).

    Row i of x and row i of y come from the same noise, which reduces the variance between
    candidates. Such pairs are not independent, so they are left out. Equal sets give exactly 0.
    """
    a, b, n = x.flatten(1).double(), y.flatten(1).double(), len(x)

    def mean(distances: Tensor) -> float:
        return ((distances.sum() - distances.diagonal().sum()) / (n * (n - 1))).item()

    return 2 * mean(torch.cdist(a, b)) - mean(torch.cdist(a, a)) - mean(torch.cdist(b, b))


def check_steps(steps: int, fine_steps: int, where: str = "baselines") -> None:
    """Refuse more steps than a computed schedule can have.

    Raises:
        UserError: `steps` exceeds `fine_steps`.
    """
    if steps > fine_steps:
        raise UserError(
            f"{where}: {steps} steps; computed schedules support at most {fine_steps} steps; "
            "give fewer"
        )


def initial_state(denoiser: Denoiser, z: Tensor, times: Tensor) -> Tensor:
    """x_t at the first of the times, from data of zeros and unit noise z (B, ...)."""
    start = times[:1].to(z.device, z.dtype).expand(len(z))
    return denoiser.process.noise(torch.zeros_like(z), start, z)


def pipeline_class(teacher: Teacher) -> str:
    """The class name of the teacher's pipeline; empty where the teacher has none."""
    return type(teacher.codec.pipe).__name__ if isinstance(teacher.codec, Prompted) else ""
