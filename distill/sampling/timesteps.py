"""Schedules: when a teacher is asked, in few steps; published ones, and two that are found here.

| paper | here |
|---|---|
| Align Your Steps, arXiv:2404.14507 | `align_your_steps`, as its authors publish it |
| GITS, arXiv:2405.11326 | `gits`: the least sum of errors of single steps, by dynamic programming |
| AutoDiffusion, arXiv:2309.10438 | `searched`: the least distance of whole samples, by evolution |

AutoDiffusion searches by the FID of its candidates' pictures to real ones, and prunes layers too.
Here it is times alone, and the distance is of samples to the teacher's own in many steps: the
energy distance in data space, which needs neither data nor a feature network, is zero of equal
laws alone, and is not the metric that the schedule is judged by afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from teachers import conditions
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.teacher import Teacher

Solver = Callable[[Denoiser, Tensor, Tensor, Cond], Tensor]  # of x_t (B, ...) and times (n,)
Nodes = tuple[int, ...]

AYS = {"StableDiffusionPipeline": "StableDiffusionSigmas",
       "StableDiffusionXLPipeline": "StableDiffusionXLSigmas"}  # fmt: skip
FOUND = ("gits", "searched")  # the schedules that are found here, for some prompts
FINE = 64  # times that a schedule is chosen from
PATHS = 32  # trajectories on which GITS measures errors
# A search is at most POPULATION + GENERATIONS * (POPULATION - PARENTS) walks of SAMPLES, and the
# fine paths of SAMPLES and of PATHS.
SAMPLES = 64  # of a candidate and of the teacher, by which it is judged
POPULATION = 12  # candidates in a generation
PARENTS = 4  # of them that live on and have children: the best
GENERATIONS = 10
REACH = 4  # places that a child's time may move by, of about FINE


def align_your_steps(teacher: Teacher, steps: int) -> Tensor:
    """The published schedule of the teacher's family, its log σ interpolated to (steps,) times."""
    from diffusers.schedulers import AysSchedules

    sigmas = torch.tensor(AysSchedules[AYS[family(teacher)]], dtype=torch.float64)
    sigmas = sigmas[sigmas > 0].log()  # σ/α; the 0 at the end is where the walk takes x̂
    where = torch.linspace(0, len(sigmas) - 1, steps, dtype=torch.float64)
    below = where.floor().long().clamp(max=len(sigmas) - 2)
    log_sigma = torch.lerp(sigmas[below], sigmas[below + 1], where - below)
    return teacher.denoiser.process.time(log_sigma.exp()).clamp(0, 1)


@torch.no_grad()
def gits(denoiser: Denoiser, z: Tensor, steps: int, cond: Cond = None, fine: int = FINE) -> Tensor:
    """The times (steps,) among `fine` whose DDIM steps err least in sum, each from the true path.

    The error of a step is the mean distance of where it lands from the fine path there; it takes
    no further evaluation, as x̂ is known at all times of the path.

    Args:
        z: Unit noise (B, ...) that the paths begin with.

    Raises:
        UserError: there are more steps than times to choose from.
    """
    process = denoiser.process
    enough(steps, fine)
    grid, device, cond = process.grid(fine), z.device, moved(cond, z.device)
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


@torch.no_grad()
def searched(
    solver: Solver, denoiser: Denoiser, z: Tensor, steps: int, cond: Cond = None, fine: int = FINE
) -> Tensor:
    """The times (steps,) whose samples by `solver` are nearest in law to those of all `fine` times.

    Chosen of the fine times and the process's own in so many steps. The search begins with the
    process's own and GITS's, so that by its measure the result is never worse than they are.

    Args:
        z: Unit noise (B, ...), the same for all candidates.

    Raises:
        UserError: there are more steps than times to choose from.
    """
    enough(steps, fine)
    process, cond = denoiser.process, moved(cond, z.device)
    grid, own = process.grid(fine), process.grid(steps)
    found = gits(denoiser, z[:PATHS], steps, conditions.rows(cond, slice(None, PATHS)), fine)
    choices = torch.cat([grid, own]).unique().flip(0)

    def walked(times: Tensor) -> Tensor:
        with torch.random.fork_rng([z.device] if z.is_cuda else []):
            torch.manual_seed(0)  # for solvers that draw noise on the way
            return solver(denoiser, begun(denoiser, z, times), times.to(z.device), cond)

    goal = walked(grid)

    def distance(nodes: Nodes) -> float:
        far = energy_distance(walked(choices[list(nodes)]), goal)
        return math.inf if math.isnan(far) else far  # a solver may blow up where steps are uneven

    founders = [
        tuple(torch.isin(choices, times).nonzero()[:, 0].tolist()) for times in (own, found)
    ]
    return choices[list(evolved(distance, founders, len(choices)))]


def evolved(distance: Callable[[Nodes], float], founders: list[Nodes], n: int) -> Nodes:
    """The best subset found of range(n), each as long as the founders are and beginning at 0.

    Always the same one; a subset is measured once however often it is born.
    """
    if len(founders[0]) == 1:
        return founders[0]
    rng = Random(0)
    known = {nodes: distance(nodes) for nodes in founders}
    living = list(known)
    for _ in range(GENERATIONS):
        parents = sorted(living, key=known.__getitem__)[:PARENTS]
        living = list(parents)
        while len(living) < POPULATION:
            nodes = child(rng.choice(parents), rng.choice(parents), n, rng)
            if nodes not in known:
                known[nodes] = distance(nodes)
            living.append(nodes)
    return min(known, key=known.__getitem__)


def child(a: Nodes, b: Nodes, n: int, rng: Random) -> Nodes:
    """A subset of both parents' nodes, one of which then moves to a free place nearby."""
    nodes = set(rng.sample(sorted({*a, *b} - {0}), len(a) - 1))
    moving = rng.choice(sorted(nodes))
    near = range(max(1, moving - REACH), min(n, moving + REACH + 1))
    if free := [i for i in near if i not in nodes]:
        nodes = nodes - {moving} | {rng.choice(free)}
    return (0, *sorted(nodes))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of independent draws, without bias, of x and y (N, ...).

    x and y are of the same noise, row by row, so that candidates differ by little else. Rows of
    one number are then not independent and are left out; two equal sets are at 0 exactly.
    """
    a, b, n = x.flatten(1).double(), y.flatten(1).double(), len(x)

    def mean(gaps: Tensor) -> float:
        return ((gaps.sum() - gaps.diagonal().sum()) / (n * (n - 1))).item()

    return 2 * mean(torch.cdist(a, b)) - mean(torch.cdist(a, a)) - mean(torch.cdist(b, b))


def enough(steps: int, fine: int, where: str = "baselines") -> None:
    """Refuse more steps than there are times to choose from.

    Raises:
        UserError: there are more.
    """
    if steps > fine:
        raise UserError(
            f"{where}: {steps} steps are more than the {fine} times to choose from; give fewer"
        )


def moved(cond: Cond, device: torch.device) -> Cond:
    """A condition on another device."""
    return conditions.moved(cond, device)


def begun(denoiser: Denoiser, z: Tensor, times: Tensor) -> Tensor:
    """x_t at the first time, of data that are all zero and unit noise z (B, ...)."""
    start = times[:1].to(z.device, z.dtype).expand(len(z))
    return denoiser.process.noise(torch.zeros_like(z), start, z)


def family(teacher: Teacher) -> str:
    """The class of the teacher's pipeline, where it has one."""
    return type(teacher.codec.pipe).__name__ if isinstance(teacher.codec, Prompted) else ""
