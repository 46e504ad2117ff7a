"""Builds a run from its recipe: checks it, makes the networks and players, opens the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import nn

from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe
from distill.config.schema import PAIRS, TrainSection
from distill.console import print_notice
from distill.data import cache
from distill.data.conditions.part import is_inside
from distill.data.encode import device
from distill.data.expansion.captions import write_prompts
from distill.data.from_recipe import (
    check_files,
    check_pictures,
    encoding_job,
    expansion_of,
    shown_prompts,
    source_of,
)
from distill.data.listing import check_labels, write_report
from distill.data.prompts import list_prompts
from distill.data.stream import Scaled, Source
from distill.early_stop.measurement import guards_of
from distill.objectives.base import Objective
from distill.objectives.validate import check_first
from distill.pairs.source import Pairs
from distill.publish.licence import check_licence
from distill.rewards import rewards
from distill.rewards.terms import RANKING, Rewards
from distill.sampling.guided_teacher import guidance_of, known_pictures, load_teacher
from distill.sampling.own_metric import OwnMetric
from distill.sampling.student_sampler import check_protocol, evaluate_student
from distill.seeds import seed_all
from distill.trackers import trackers
from distill.training import custom_objective, optimizers
from distill.training.compilation import compile_run, mode_of
from distill.training.engine import Engine, check_memory, shards_of
from distill.training.networks import check_form, form_for, objective_of, player_networks
from distill.training.player import Player
from distill.training.preflight import rehearse_end
from distill.training.rehearsal import check_finite
from distill.training.run_folder import (
    check_checkpoints,
    check_folder,
    hold,
    keep_adapters,
    write_recipe,
)
from eval import shapes
from eval.catalogue import headline
from eval.protocols.measure import Protocol, protocol
from students.form import StudentForm
from students.generator import Generator
from teachers import conditions
from teachers.errors import UserError
from teachers.storage.plugin import function_at
from teachers.teacher import Teacher


@dataclass
class Run:
    """A recipe's run, ready to train."""

    recipe: Recipe
    teacher: Teacher
    engine: Engine
    protocol: Protocol | None
    out: Path
    metric: OwnMetric | None = None

    @property
    def student(self) -> Generator:
        return self.engine.objective.student

    @property
    def form(self) -> StudentForm:
        return form_for(self.recipe, self.teacher)


@dataclass
class Parts:
    """The parts of a run before its folder is opened; nothing is written yet.

    flops: Of one sample through the teacher's network.
    """

    teacher: Teacher
    source: Source
    protocol: Protocol | None
    accelerator: Accelerator
    objective: Objective
    players: dict[str, Player]
    flops: float | None
    metric: OwnMetric | None


def build(recipe: Recipe, out: Path, resume: bool = False) -> Run:
    """A new run in `out`, or with `resume` the run in `out` at its newest checkpoint.

    Everything that can be refused is refused before anything is written.

    Raises:
        UserError: the folder contains another run or another process holds it, the licence of the
            teacher or of its weaker one forbids sharing the student, or parts of the recipe do not
            go together.
    """
    check(recipe, out, resume)
    parts = networks(recipe, out, resume)
    return open_run(recipe, parts, out, resume)


def check(recipe: Recipe, out: Path, resume: bool) -> None:
    """Check all that needs no teacher.

    Raises:
        UserError: as `build` does.
    """
    check_folder(recipe, out, resume)
    if resume:
        check_checkpoints(out)
    for origin in filter(None, (recipe.teacher.source, guidance_of(recipe.teacher).weaker)):
        check_licence(origin, recipe.export.licence_override)
    check_files(recipe)
    if recipe.train.precision == "fp16" and device().type == "cpu":
        raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32")
    if (takes := known_pictures(recipe.teacher)) is not None:
        check_pictures(recipe, takes)
    for name, configs in recipe.players.items():
        optimizers.check(configs.optimizer, name)
    trackers(recipe.train.trackers, out)
    if recipe.eval.protocol:
        protocol(recipe.eval.protocol)
    if recipe.eval.metric:
        function_at(recipe.eval.metric, "eval.metric")


def networks(recipe: Recipe, out: Path, resume: bool) -> Parts:
    """The teacher, its data, the objective's networks and their players, each called once.

    Raises:
        UserError: parts do not go together, or the student could not be exported.
    """
    measure = protocol(recipe.eval.protocol) if recipe.eval.protocol else None
    mode = mode_of(recipe, device())
    teacher = load_teacher(recipe.teacher)
    form = form_for(recipe, teacher)
    if measure is not None:
        check_protocol(measure, teacher)
        measure.check()
    check_form(recipe, form)
    pairs = recipe.data.source == PAIRS
    source = Pairs(recipe, teacher) if pairs else coupled(recipe, source_of(recipe, teacher))
    accelerator = accelerator_of(recipe.train, out)
    shards = shards_of(recipe.train, accelerator.num_processes)
    check_memory(recipe.train, teacher.shape, shards)
    rehearse = form.rehearsal(accelerator.device)  # its prompts are encoded before networks move
    teacher.denoiser.to(accelerator.device)
    seed_all(recipe.train.seed, "init")
    objective = objective_of(recipe, teacher, accelerator.device)
    objective.check_batch((recipe.train.batch // shards, *teacher.shape))
    note_last_stage(objective, recipe.train.steps)
    if isinstance(source, Pairs):  # making them is work, so what can be refused comes first
        source = coupled(recipe, source.source())
    metric = OwnMetric(recipe, teacher, source) if recipe.eval.metric else None
    if resume and source.report is not None:
        check_labels(out, source.report)
    if recipe.rewards:
        differentiated = not objective.needs_reward or objective.differentiates_reward
        objective.reward = rewards.reward_of(recipe, teacher, source, differentiated)
        rewards.rehearse(objective, source, accelerator.device)
        rewards.rehearse_held_out(recipe, teacher, grid_prompts(recipe, teacher)[:2])
    if guidance_of(recipe.teacher).kind == "skip":
        rehearse_skipping(objective.teacher, teacher, accelerator.device)
    flops = check_finite(objective.teacher, teacher, source, recipe.train, accelerator)
    rehearse(objective.student)
    if form.leaves_pipeline:
        rehearse_end(recipe, objective.student, teacher)
    players = players_of(objective, recipe.players, recipe.train.steps, accelerator)
    if custom_objective.file_of(recipe) is not None:
        custom_objective.rehearse(objective, players, source, recipe.train, accelerator)
    compile_run(recipe, objective, players[objective.trains], source, accelerator, mode)
    return Parts(teacher, source, measure, accelerator, objective, players, flops, metric)


def coupled(recipe: Recipe, source: Source) -> Source:
    """The training data, with the recipe's coupling and drawn guidance scales.

    Raises:
        UserError: the recipe's keys do not go together with them.
    """
    source.couple(recipe.data.coupling)
    if (scales := guidance_of(recipe.teacher).range) is not None:
        return Scaled(source, *scales)
    return source


def note_last_stage(objective: Objective, steps: int) -> None:
    """Say so where training ends before the objective's last stage begins."""
    if objective.last_stage >= steps:
        print_notice(
            f"train.steps: training ends at step {steps:,}, and the last stage of the objective "
            f"begins at step {objective.last_stage:,}; the student is not trained in it"
        )


def open_run(recipe: Recipe, parts: Parts, out: Path, resume: bool) -> Run:
    """Make and lock the run's folder, load its checkpoint and write its recipe.

    Raises:
        UserError: another process holds the folder, or its checkpoint cannot be read.
    """
    accelerator, measure = parts.accelerator, parts.protocol
    accelerator.wait_for_everyone()  # or a slow one would check a folder with this run's files
    if accelerator.is_main_process:
        hold(out)
        check_folder(recipe, out, resume)  # again: another run may have started since
    accelerator.wait_for_everyone()
    student, teacher = parts.objective.student, parts.teacher

    metric = parts.metric

    def evaluate(steps: int) -> dict[str, Any]:
        if metric is not None:
            metrics = metric.student(student.at(steps), seeds=1)
            first = next(iter(metrics["spread"]))
            lower = metric.lower_is_better
            return {**metrics, "headline" if lower else "raised": first}
        assert measure is not None
        metrics = evaluate_student(student.at(steps), teacher, measure, seeds=1)
        return {**metrics, "headline": headline(metrics)}

    train = recipe.train
    form = form_for(recipe, teacher)
    if not form.draws_pictures or recipe.kind.trains != "student":
        train = train.model_copy(update={"sample_every": 0})
    shown = grid_prompts(recipe, teacher)
    engine = Engine(
        parts.objective,
        parts.players,
        parts.source,
        teacher,
        train,
        accelerator,
        out,
        evaluate=None if measure is None and metric is None else evaluate,
        evaluate_every=recipe.eval.every,
        stop_when_flat=recipe.eval.stop_when_flat,
        shown=shown,
        sample_flops=parts.flops,
        guards=guards_of(recipe, teacher, student, shown, rewards.held_out_of(recipe, teacher)),
    )
    resumed = engine.resume() if resume else False
    if accelerator.is_main_process:  # once the checkpoint is known to be good
        if not resumed:  # a run may have been killed before its first checkpoint
            (out / "metrics.jsonl").unlink(missing_ok=True)
        keep_adapters(parts.teacher.fusion, out)
        write_recipe(recipe, out)
        if parts.source.report is not None:
            write_report(out, parts.source.report)
        if (prompts := expansion_of(recipe)) is not None:
            write_prompts(prompts, out)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("fewstep")
    return Run(recipe, teacher, engine, measure, out, metric)


def accelerator_of(train: TrainSection, out: Path) -> Accelerator:
    """An Accelerator with this run's precision and trackers."""
    forget_precision()
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(train.precision, train.precision),
        log_with=trackers(train.trackers, out),
        # A cast that a no_grad pass caches would have no gradient in the pass after it.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        project_dir=str(out),
    )


def players_of(
    objective: Objective, configs: dict[str, OptimizerConfig], steps: int, accelerator: Accelerator
) -> dict[str, Player]:
    """Check the objective's first turn, and make a player for each network that it trains.

    Raises:
        UserError: the objective's first turn could not be played.
    """
    movers = player_networks(objective)
    check_first(objective, movers)
    if isinstance(objective.reward, Rewards) and len(objective.reward.networks):
        movers[RANKING] = objective.reward.networks.to(accelerator.device)
    chosen = {name: configs.get(name, OptimizerConfig()) for name in movers}
    return {
        name: Player(chosen[name].learning(network, name), accelerator, chosen[name], steps)
        for name, network in movers.items()
    }


def forget_precision() -> None:
    """Let this process build another run with another `train.precision`.

    Accelerate keeps the first precision in a global state and refuses a second. A run that is being
    trained has a reference to its own state; the group of processes, which runs share, stays.
    """
    AcceleratorState._shared_state = type(AcceleratorState._shared_state)()


@torch.no_grad()
def rehearse_skipping(guided: nn.Module, teacher: Teacher, device: torch.device) -> None:
    """Call the guided teacher once.

    Raises:
        UserError: one of its blocks cannot be skipped, which only a call shows.
    """
    null = teacher.codec.null
    cond = conditions.moved(null, device)
    guided(
        torch.zeros(1, *teacher.shape, device=device), torch.full((1,), 0.5, device=device), cond
    )


def grid_prompts(recipe: Recipe, teacher: Teacher) -> list[Any]:
    """What the sample grids show: every class in turn, or prompts of the recipe's own kind.

    Those that `data.where` leaves out give their place to the others; where none is left, all stay.
    """
    every, where = _grid_prompts(recipe, teacher), recipe.data.where
    if where is None or teacher.codec.pictures:
        return every
    inside = [v for v in every if is_inside(v, where)] or every
    return [inside[i % len(inside)] for i in range(len(every))]


def _grid_prompts(recipe: Recipe, teacher: Teacher) -> list[Any]:
    if classes := teacher.codec.classes:
        return [i % classes for i in range(80)]
    if teacher.codec.pictures:
        return shown_prompts(recipe, teacher)
    if teacher.codec.condition([""]) is None:
        return [0] * 80
    if "shapes" in (recipe.eval.protocol, recipe.data.source):
        return shapes.captions(40, seed=0)
    if (prompts := expansion_of(recipe)) is not None:
        return (prompts.expansion.captions or prompts.prompts)[:10]
    return [item.prompt for item in list_prompts(recipe.data.prompts or "pack:starter").items[:10]]


def make_cache(recipe: Recipe) -> dict[str, Any]:
    """Encode the recipe's prompts and images into their cache. The content of data-report.json.

    Raises:
        UserError: there is nothing to encode, too many items are bad, or the cache is too large.
    """
    job = encoding_job(recipe, load_teacher(recipe.teacher))
    if job is None:
        raise UserError("cache: the recipe's data are embedded or labels, which need no cache")
    made = cache.fill(job, recipe.data)
    return made.open(recipe.train.seed, recipe.data.skip_share).report or {}
