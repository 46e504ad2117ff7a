"""How many training steps a budget of network evaluations, or of seconds, allows.

A run's evaluations depend on its recipe and seed alone. So they are counted before the run: the
objective's turns are played with the engine's seeds on networks that return their input. For a
budget in seconds, some steps of the real run are timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.config.schema import PAIRS
from distill.data.stream import Stream
from distill.objectives.balance import last_layer
from distill.objectives.base import Batch
from distill.objectives.features.base import FeatureMatching
from distill.pairs.making import Maker
from distill.pairs.settings import settings_of
from distill.pairs.source import Pairs
from distill.profiling import EvaluationCounter, denoisers_in
from distill.rewards.terms import RANKING
from distill.sampling.guided_teacher import load_teacher
from distill.seeds import seed_all
from distill.training.build import build
from distill.training.networks import assembled, build_networks, path_of
from students.critic import Critic, FeatureMean
from students.two_time import NumberReading
from teachers.denoiser import Cond, Denoiser, computes
from teachers.errors import UserError
from teachers.process import Process

WARM = 4  # steps that are not timed: the first ones allocate memory
TIMED = 12  # steps that are timed: enough for an objective whose student learns every fifth step


def steps_for_evaluations(recipe: Recipe, budget: float, most: int | None = None) -> int:
    """The most training steps whose samples through all networks do not exceed the budget.

    Args:
        most: Where counting may stop.

    Raises:
        UserError: the budget is below one step, or a step evaluates no network.
    """
    before = pair_evaluations(recipe)
    steps, spent, total = 0, before, before
    learns = min((player.begins for player in recipe.players.values()), default=0)
    for total in islice((before + n for n in evaluations_after_steps(recipe)), most):
        if total == spent and steps >= learns:
            raise UserError(
                f"budget: step {steps + 1} evaluates no network, so steps are free; use seconds"
            )
        if total > budget:
            break
        steps, spent = steps + 1, total
    if not steps:
        raise UserError(
            f"budget: {budget:,} network evaluations do not buy one step, which takes {total:,}; "
            "raise it"
        )
    return steps


def pair_evaluations(recipe: Recipe) -> int:
    """The network evaluations of the pairs that a run learns from; 0 for one without pairs."""
    if recipe.data.source != PAIRS:
        return 0
    teacher, settings = load_teacher(recipe.teacher), settings_of(recipe)
    if (index := Pairs(recipe, teacher).index) is not None:
        return int(index["evaluations"])
    maker = Maker(settings, teacher)
    maker.denoiser = echo_networks({"teacher": maker.denoiser})["teacher"]  # pyright: ignore
    sampled = maker.make(range(1))[1] * settings.count
    if not settings.inverted:
        return sampled
    first = range(settings.count, settings.count + 1)
    return sampled + maker.make(first)[1] * settings.inverted


def evaluations_after_steps(recipe: Recipe) -> Iterator[int]:
    """The samples through all networks after step 1, 2, …, as the engine will count them.

    Whole shards are played, since objectives divide them by shares and into groups.
    """
    teacher = load_teacher(recipe.teacher)
    networks = echo_networks(build_networks(recipe, teacher))
    objective = assembled(recipe, networks, torch.device("cpu"))
    if isinstance(objective, FeatureMatching):
        objective.outputs = partial(echo_outputs, objective.unguided)
    fields = {k: v for k, v in vars(objective).items() if isinstance(v, nn.Module)}
    seed, size = recipe.train.seed, recipe.train.batch // recipe.train.accumulate
    x, cond = torch.zeros(size, *teacher.shape), teacher.codec.condition([0] * size)
    batch = Batch(x if recipe.needs_data else None, x.clone(), cond, path=path_of(recipe, x))
    counter = EvaluationCounter(denoisers_in(fields))
    begins = {name: player.begins for name, player in recipe.players.items()}
    ranking = [RANKING] if any(r.kind == "ranked" for r in recipe.rewards.values()) else []
    for step in count():
        with counter as counts:
            seed_all(seed, "turns", step, 0)
            for place, turn in enumerate(objective.turns(step)):
                seed_all(seed, step, place, 0)
                learning = [*turn.players, *(ranking if "student" in turn.players else [])]
                if any(step >= begins.get(name, 0) for name in learning):
                    turn.loss(batch)
                seed_all(seed, "turns", step, place + 1)
        yield sum(counts.values()) * recipe.train.batch // size


class Echo(Denoiser):
    """A network that computes nothing: it returns its input, and its calls are counted.

    It has the network's parts, parameters and buffers under their own names. Where it learns, its
    output has a gradient of zero to its last layer: some objectives balance their terms there.
    """

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: not a submodule
        self._modules, self._buffers = network._modules, network._buffers
        self._parameters = network._parameters

    @property
    def process(self) -> Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._network[0].process

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        if not any(p.requires_grad for p in self.parameters()):
            return x_t
        return x_t + 0 * last_layer(self).sum()

    def weight(self, t: Tensor) -> Tensor:
        return self._network[0].weight(t)


def echo_outputs(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """Two features (B, 2) in place of those of the denoiser's blocks, after its call."""
    return [denoiser(x_t, t, cond).flatten(1)[:, :2]]


class EchoCritic(FeatureMean):
    """A critic that cannot tell: logits of 0, after the call of its denoiser, which is counted.

    They have a gradient of zero to the samples: some objectives balance their terms by it. They are
    (B,), or (B, 1) of a critic with a logit for each place.
    """

    def __init__(self, critic: Critic, denoiser: Denoiser) -> None:
        nn.Module.__init__(self)
        self._denoiser, self.heads = (denoiser, []), critic.heads
        self.places = isinstance(critic, FeatureMean)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        logits = self.denoise(x_t, t, cond)[1]
        return logits if self.places else logits[:, 0]

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        return self._denoiser[0](x_t, t, cond), 0 * x_t.flatten(1).sum(1, keepdim=True)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> list[Tensor]:
        return [self.denoise(x_t, t, cond)[1]]

    def read(self, features: Sequence[Tensor]) -> Tensor:
        return features[0][:, 0]


def echo_networks(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks, in which every denoiser that computes is replaced by its `Echo`.

    What wraps denoisers is changed in place; a denoiser that stands at several places has one echo.
    """
    echoes: dict[nn.Module, Denoiser] = {}

    def echo(module: Any) -> Any:
        if isinstance(module, Critic):
            return EchoCritic(module, echo(module._denoiser[0]))
        if isinstance(module, NumberReading):  # it adds to layers, and none runs
            return echo(module.denoiser)
        if not computes(module):
            for name, child in module.named_children():
                setattr(module, name, echo(child))
            return module
        return echoes.setdefault(module, Echo(module))

    return {name: echo(network) for name, network in networks.items()}


def steps_for_seconds(recipe: Recipe, budget: float) -> int:
    """The training steps that fit in `budget` seconds on this machine; some are timed.

    Raises:
        UserError: one step takes longer, or the recipe cannot be built.
    """
    with tempfile.TemporaryDirectory() as scratch:
        engine = build(recipe, Path(scratch) / "run").engine
        shards = engine.shards
        stream = Stream(
            engine.source, engine.accelerator.device, 0, range(shards), shards,
            recipe.train.batch // shards,
        )  # fmt: skip
        try:
            for _ in range(WARM):
                engine.advance(stream)
            _wait(engine.accelerator.device)
            began = time.perf_counter()
            for _ in range(TIMED):
                engine.advance(stream)
            _wait(engine.accelerator.device)
        finally:
            stream.close()
    each = (time.perf_counter() - began) / TIMED
    if budget < each:
        raise UserError(f"budget: a step takes {each:.3g} s, so {budget:g} s buy none; raise it")
    return int(budget / each)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
