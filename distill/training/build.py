"""Builds a run from its recipe, and finishes it: the one module that sees every package."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import nn

from distill.config.compare import differences
from distill.config.optimizer import Moves
from distill.config.recipe import Recipe, networks_of, read_yaml
from distill.data import cache
from distill.data.encode import device
from distill.data.from_recipe import source_of, work_of
from distill.data.listing import check_labels, write_report
from distill.data.prompts import list_prompts
from distill.objectives.base import Objective
from distill.objectives.validate import check_first
from distill.publish.licence import check_licence
from distill.sampling.guided_teacher import guidance_of, guided, load_teacher
from distill.sampling.student_sampler import check_protocol, evaluate_student
from distill.seeds import seed_all
from distill.training import checkpoint, custom_objective, optimizers
from distill.training.engine import Engine, check_memory, shards_of
from distill.training.player import Player
from distill.training.preflight import rehearse_end
from distill.training.rehearsal import check_finite
from distill.training.run_lock import refuse_live, take
from distill.training.trackers import trackers
from eval import shapes
from eval.protocols.measure import Protocol, headline, protocol
from students import gaussian, schedulers
from students.critic import Critic
from students.export.folder import rehearse
from students.generator import Generator
from students.lora import Adapted, adapted, checkpointing, unwrap, whole
from teachers.denoiser import Network
from teachers.errors import UserError
from teachers.teacher import Teacher


@dataclass
class Run:
    """Everything that a recipe describes, ready to train."""

    recipe: Recipe
    teacher: Teacher
    engine: Engine
    protocol: Protocol | None
    out: Path

    @property
    def student(self) -> Generator:
        return self.engine.objective.student


def build(recipe: Recipe, out: Path, resume: bool = False) -> Run:
    """A run in `out`, taken up where it stopped if `resume`.

    Nothing is written before the recipe is known to be possible.

    Raises:
        UserError: the folder holds another run or one that is at work, the licence of the teacher
            or of the weaker one that guides it lets nobody share the student, or the recipe asks
            for what cannot be.
    """
    check_folder(recipe, out, resume)
    if resume and (out / "summary.json").exists() and not checkpoint.steps(out / "checkpoints"):
        raise UserError(
            f"--resume: the run in {out} came to its end and its checkpoints are gone; "
            "train again in another folder"
        )
    for origin in filter(None, (recipe.teacher.source, guidance_of(recipe).weaker)):
        check_licence(origin, recipe.export.licence_override)
    if recipe.train.precision == "fp16" and device().type == "cpu":
        raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32")
    for name, moves in recipe.players.items():
        optimizers.check(moves.optimizer, name)
    log_with = trackers(recipe.train.trackers, out)
    measure = protocol(recipe.eval.protocol) if recipe.eval.protocol else None
    teacher = load_teacher(recipe)
    if measure is not None:
        check_protocol(measure, teacher)
        measure.check()
    if recipe.kind.few_step and gaussian.exact(teacher):
        check_exact(recipe, teacher)
    source = source_of(recipe, teacher)
    if resume and source.report is not None:
        check_labels(out, source.report)
    forget_precision()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.train.precision, recipe.train.precision),
        log_with=log_with,
        # A cast cached in a no_grad pass would cut the graph of the pass with gradients after it.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        project_dir=str(out),
    )
    check_memory(recipe.train, teacher.shape, shards_of(recipe.train, accelerator.num_processes))
    teacher.denoiser.to(accelerator.device)
    seed_all(recipe.train.seed, "init")
    objective = objective_of(recipe, teacher, accelerator.device)
    if guidance_of(recipe).kind == "skip":
        rehearse_skipping(objective.teacher, teacher, accelerator.device)
    check_finite(objective.teacher, teacher, source, recipe.train, accelerator)
    if recipe.kind.few_step and not gaussian.exact(teacher):  # linear students have no pipeline
        rehearse(objective.student, teacher)
        rehearse_end(recipe, objective.student, teacher)
    movers = player_networks(objective)
    check_first(objective, movers)
    players = {
        name: Player(
            network.parameters(), accelerator, recipe.players.get(name, Moves()), recipe.train.steps
        )
        for name, network in movers.items()
    }
    if custom_objective.file_of(recipe) is not None:
        custom_objective.rehearse(objective, players, source, recipe.train, accelerator)
    accelerator.wait_for_everyone()  # a slow process must not take what is written now for old
    if accelerator.is_main_process:
        hold(out)
        check_folder(recipe, out, resume)  # again: another may have begun meanwhile
    accelerator.wait_for_everyone()
    run = Run(recipe, teacher, None, measure, out)  # pyright: ignore[reportArgumentType]

    def evaluate(steps: int) -> dict[str, Any]:
        assert measure is not None
        found = evaluate_student(run.student.at(steps), teacher, measure, seeds=1)
        return {**found, "headline": headline(found)}

    run.engine = Engine(
        objective,
        players,
        source,
        teacher,
        recipe.train,
        accelerator,
        out,
        evaluate=None if measure is None else evaluate,
        evaluate_every=recipe.eval.every,
        shown=shown(recipe, teacher),
    )
    resumed = run.engine.resume() if resume else False
    if accelerator.is_main_process:  # after what could be refused of the checkpoint
        if not resumed:
            (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run killed before it saved
        draft = out / ".recipe.yaml"
        draft.write_text(yaml.safe_dump(recipe.tree(), sort_keys=False), encoding="utf-8")
        draft.replace(out / "recipe.yaml")
        custom_objective.keep(recipe, out)
        if source.report is not None:
            write_report(out, source.report)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("fewstep")
    return run


def forget_precision() -> None:
    """Let a process that has built one run build another, of another `train.precision`.

    Accelerate keeps the first one's for as long as the process lives, and refuses a second. A run
    that is under way holds on to its own; the processes' group, which runs share, stays.
    """
    AcceleratorState._shared_state = type(AcceleratorState._shared_state)()


FILES = ("recipe.yaml", "metrics.jsonl", "summary.json", "report.html", ".lock")
FOLDERS = ("checkpoints", "samples", "student")


def hold(out: Path) -> None:
    """Make a run's folder, where there is none, and hold it for this process.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        take(out)
    except OSError as error:
        raise UserError(f"--out {out}: it cannot be written to ({error.strerror})") from None


def check_places(out: Path) -> None:
    """Refuse a folder in which something else stands where a run's files go.

    Raises:
        UserError: naming it.
    """
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out}: it is a link to nothing; give a folder")
    for name in FILES:
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} in it is a folder; give another, or remove that")
    for name in FOLDERS:
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(f"--out {out}: {name} in it is no folder; give another, or remove that")


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse to write over a run, or to go on with a different one, or with one that is at work."""
    check_places(out)
    there = next(p for p in (out.absolute(), *out.absolute().parents) if exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    refuse_live(out)
    written = out / "recipe.yaml"
    if not written.exists():
        if resume and not out.exists():
            raise UserError(f"--resume: there is no run in {out}")
        if out.exists() and any(p for p in out.iterdir() if not p.name.startswith(".")):
            raise UserError(f"--out {out} exists and is not a run; give a new folder")
        return
    if not resume:
        raise UserError(f"--out {out} already holds a run; add --resume, or give another folder")
    before = read_yaml(written)
    if changed := differences(before, recipe.tree()):
        key, old, new = changed[0]
        raise UserError(
            f"--resume: {key} was {old!r} in {out} and is {new!r} now; "
            "resume with the recipe it began with, or start in another folder"
        )
    taken = checkpoint.steps(out / "checkpoints")
    if taken and (count := int(taken[-1].name[5:])) > recipe.train.steps:
        raise UserError(
            f"--resume: train.steps: {recipe.train.steps} is fewer than the {count} steps that "
            f"the run in {out} has taken; ask for as many or more"
        )
    if taken:
        custom_objective.check_same(recipe, out)


def exists(path: Path) -> bool:
    """Whether something is there; a path that cannot even be asked about is a mistake."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"--out {str(path)[:60]}…: {error.strerror}") from None


@torch.no_grad()
def rehearse_skipping(guided: nn.Module, teacher: Teacher, device: torch.device) -> None:
    """Call the guided teacher once, which is when a block that cannot be skipped is found out."""
    null = teacher.codec.null
    cond = null and {k: v.to(device) for k, v in null.items()}
    guided(
        torch.zeros(1, *teacher.shape, device=device), torch.full((1,), 0.5, device=device), cond
    )


def shown(recipe: Recipe, teacher: Teacher) -> list[Any]:
    """What the sample grids show: every class in turn, or prompts of the recipe's own kind."""
    if classes := getattr(teacher.codec, "classes", 0):
        return [i % classes for i in range(80)]
    if teacher.codec.condition([""]) is None:
        return [0] * 80
    if "shapes" in (recipe.eval.protocol, recipe.data.source):
        return shapes.captions(40, seed=0)
    return [item.prompt for item in list_prompts(recipe.data.prompts or "pack:starter").items[:10]]


def objective_of(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The objective with its networks: a student, and what else its fields name."""
    kind = recipe.kind
    adapters = recipe.adapters
    if kind.few_step and gaussian.exact(teacher):
        return exact_objective(recipe, teacher, device)
    names = [n for n in networks_of(kind) if n not in ("teacher", "student", "critic")]
    shared: tuple[str, ...] = ()
    if adapters and kind.few_step:
        shared = ("student", *names) if adapters.players is None else adapters.players
    # copies first: once there are adapters on the teacher's weights, a copy would hold them as well
    networks: dict[str, nn.Module] = {
        n: whole(deepcopy(teacher.denoiser)).requires_grad_(True) for n in names if n not in shared
    }
    if kind.few_step:
        s = recipe.student
        adapter = adapters.adapter if adapters and "student" in shared else None
        student = schedulers.student(teacher, s.steps, s.start, s.renoise, adapter)
        trained = s.trained(kind.learns, student.counts)
        networks["student"] = student.keep(*trained, weights=list(trained.values()))
    else:
        networks["student"] = Generator(deepcopy(teacher.denoiser).requires_grad_(True))
    for name in [n for n in names if n in shared]:
        assert adapters is not None
        networks[name] = adapted(teacher, adapters.adapter, name)
    networks["teacher"] = guided(recipe, teacher)
    if recipe.critic is not None:
        fake: Any = networks["fake"]
        cond = teacher.codec.condition([0])
        try:
            named = recipe.critic.blocks
            blocks = (unwrap(fake).middle,) if named is None else named
            networks["critic"] = Critic(fake, teacher.shape, cond, blocks)
        except ValueError as error:
            raise UserError(f"critic.blocks: {error}") from None
    if recipe.train.checkpointing:
        for backbone in backbones(networks):
            checkpointing(backbone)
    return assembled(recipe, networks, device)


def check_exact(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse what the linear student of a closed-form Gaussian has not.

    Raises:
        UserError: naming the section.
    """
    where, names = f"teacher {teacher.source!r}", networks_of(recipe.kind)
    if "fake" not in names:
        raise UserError(
            f"{where}: objective.name: {recipe.objective['name']} trains at many times, and its "
            "students are linear and of one; use one with a fake score, such as dmd2 or sid"
        )
    for section, given in (("adapters", recipe.adapters), ("critic", recipe.critic)):
        if given is not None:
            raise UserError(f"{where}: {section}: its students are linear; remove the section")
    if recipe.student.steps != 1:
        raise UserError(f"{where}: student.steps: its students are linear and take 1")
    if recipe.train.sample_every:
        raise UserError(f"{where}: train.sample_every: it has no pictures to show; set it to 0")


def exact_objective(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The objective of a closed-form Gaussian teacher: a linear student, fake scores as exact."""
    names = networks_of(recipe.kind)
    networks: dict[str, nn.Module] = {
        n: gaussian.score(teacher) for n in names if n not in ("teacher", "student", "critic")
    }
    networks |= {"student": gaussian.student(teacher), "teacher": guided(recipe, teacher)}
    return assembled(recipe, networks, device)


def assembled(recipe: Recipe, networks: dict[str, nn.Module], device: torch.device) -> Objective:
    """The recipe's objective with its networks, all on the device and in eval mode."""
    for network in networks.values():
        network.to(device).eval()  # dropout would differ between teacher, fake and student
    keys = {k: v for k, v in recipe.objective.items() if k != "name"}
    schema = recipe.keys_schema().model_validate(keys)
    return recipe.kind(**networks, **{k: getattr(schema, k) for k in keys})  # pyright: ignore


def backbones(networks: dict[str, nn.Module]) -> list[nn.Module]:
    """The distinct backbones under a set of networks: adapters share one."""
    found = []
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, Adapted | Network):
                found.append(unwrap(module).backbone)
    return list(dict.fromkeys(found))


def player_networks(objective: Objective) -> dict[str, nn.Module]:
    """The networks that move: all of an objective's, but for the teacher and absent ones."""
    names = [n for n in networks_of(type(objective)) if n != "teacher"]
    return {n: v for n in names if (v := getattr(objective, n)) is not None}


def make_cache(recipe: Recipe) -> dict[str, Any]:
    """Encode the recipe's prompts and images into their cache; what data-report.json holds.

    Raises:
        UserError: there is nothing to encode, or too much of it is bad or large.
    """
    work = work_of(recipe, load_teacher(recipe))
    if work is None:
        raise UserError("cache: the recipe's data are embedded or labels, which need no cache")
    made = cache.fill(work, recipe.data)
    return made.open(recipe.train.seed, recipe.data.skip_share).report or {}
