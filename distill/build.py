"""Builds a run from its recipe, and finishes it: the one module that sees every package."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import nn

from distill import cache
from distill.data import Source
from distill.encode import Work, picture_shape
from distill.engine import Engine, check_memory, shards_of
from distill.images import into_buckets, list_images, sizes_of
from distill.listing import write_report
from distill.objective import Objective, check_first
from distill.player import Moves, Player
from distill.prompts import list_prompts
from distill.recipe import GuidanceSection, Recipe, networks_of, read_yaml
from distill.seeds import seed_all
from distill.trackers import trackers
from eval import digits, shapes
from eval.protocol import Protocol, images_to_samples, protocol
from eval.samples import Samples
from students import lora_files, stock
from students.critic import Critic
from students.export import draw, export, rehearse
from students.generator import Generator
from students.lora import Adapted, adapted, checkpointing, unwrap, whole
from teachers.denoiser import Denoiser, Guided, Mix, Network, Under, linear
from teachers.errors import UserError
from teachers.guidance import Auto, Interval, Projected, Rescaled, Skipping, describe
from teachers.solver import evaluations, solve
from teachers.teacher import EMBEDDED, Teacher, load

TEACHER_FEW = (1, 2, 4)  # the teacher's own few-step samples, shown beside the student's


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
        UserError: the folder holds another run, or the recipe asks for what cannot be.
    """
    check_folder(recipe, out, resume)
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32")
    log_with = trackers(recipe.train.trackers, out)
    measure = protocol(recipe.eval.protocol) if recipe.eval.protocol else None
    teacher = load_teacher(recipe)
    if measure is not None:
        check_protocol(measure, teacher)
    source = source_of(recipe, teacher)
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
    if recipe.kind.few_step:
        rehearse(objective.student, teacher)
    movers = player_networks(objective)
    check_first(objective, movers)
    players = {
        name: Player(
            network.parameters(), accelerator, recipe.players.get(name, Moves()), recipe.train.steps
        )
        for name, network in movers.items()
    }
    accelerator.wait_for_everyone()  # a slow process must not take what is written now for old
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        draft = out / ".recipe.yaml"
        draft.write_text(yaml.safe_dump(recipe.tree(), sort_keys=False))
        draft.replace(out / "recipe.yaml")
        if source.report is not None:
            write_report(out, source.report)
    accelerator.wait_for_everyone()
    run = Run(recipe, teacher, None, measure, out)  # pyright: ignore[reportArgumentType]
    run.engine = Engine(
        objective,
        players,
        source,
        teacher,
        recipe.train,
        accelerator,
        out,
        evaluate=None if measure is None else lambda steps: evaluate_student(run, steps, seeds=1),
        evaluate_every=recipe.eval.every,
        shown=shown(recipe, teacher),
    )
    resumed = run.engine.resume() if resume else False
    if not resumed and accelerator.is_main_process:
        (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run killed before it saved
    accelerator.init_trackers("fewstep")
    return run


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse to write over a run, or to go on with a different one."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
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


def exists(path: Path) -> bool:
    """Whether something is there; a path that cannot even be asked about is a mistake."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"--out {str(path)[:60]}…: {error.strerror}") from None


# What may change between a run and its resumption: none of it alters the weights so far.
FREE = {"train.steps", "train.log_every", "train.save_every", "train.sample_every", "train.keep",
        "train.trackers", "train.accumulate", "data.cache", "data.cache_limit_gb",
        "data.in_memory_gb", "data.skip_share"}  # fmt: skip


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The key paths at which two plain trees differ, but for those free to."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for k in {**a, **b}:
            found += differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))
        return found
    free = path in FREE or path.startswith("eval")
    return [] if a == b or free else [(path, a, b)]


def shown(recipe: Recipe, teacher: Teacher) -> list[Any]:
    """What the sample grids show: every class in turn, or some of the prompts."""
    if classes := getattr(teacher.codec, "classes", 0):
        return [i % classes for i in range(80)]
    if teacher.codec.condition([""]) is None:
        return [0] * 80
    if recipe.eval.protocol == "shapes":
        return shapes.captions(40, seed=0)
    return [item.prompt for item in list_prompts("pack:starter").items[:10]]


def load_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher, unguided."""
    teacher = load(recipe.teacher.source, **recipe.teacher.options())
    how = guidance_of(recipe)
    if how.kind in ("cfg", "apg") and how.scale != 1 and teacher.codec.null is None:
        raise UserError(
            f"teacher.guidance: {how.scale} needs a null class, and "
            f"{recipe.teacher.source!r} names none; set teacher.null_label, or guidance to 1"
        )
    return teacher


def guidance_of(recipe: Recipe) -> GuidanceSection:
    """The recipe's guidance, all of it spelled out: a number alone is classifier-free."""
    how = recipe.teacher.guidance
    return how if isinstance(how, GuidanceSection) else GuidanceSection(scale=how)


def guided(recipe: Recipe, teacher: Teacher) -> Denoiser:
    """What the objective sees as its teacher; scale 1 passes straight through.

    Raises:
        UserError: a block that is to be skipped is not there, or the weaker teacher does not fit.
    """
    how, denoiser = guidance_of(recipe), teacher.denoiser
    mix: Mix = linear
    if how.kind == "apg":
        mix = Projected(how.eta or 0.0, how.threshold)
    if how.rescale:
        mix = Rescaled(how.rescale, mix)
    if how.kind == "skip":
        found: Guided = Skipping(denoiser, how.scale, how.blocks, mix)
    elif how.weaker is not None:
        found = Auto(denoiser, how.scale, weaker(how.weaker, recipe, teacher), mix)
    else:
        found = Guided(denoiser, how.scale, teacher.codec.null, mix)
    return found if how.interval is None else Interval(found, *how.interval)


def weaker(source: str, recipe: Recipe, teacher: Teacher) -> Denoiser:
    """Autoguidance's weaker network, under the teacher's process and on its device."""
    other = read_once(source, recipe.teacher.null_label)
    if other.shape != teacher.shape:
        want, got = ("×".join(map(str, s)) for s in (teacher.shape, other.shape))
        raise UserError(f"teacher.guidance.weaker: {source!r} is {got}; the teacher is {want}")
    parameters = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    denoiser = other.denoiser.to(parameters[0].device)
    same = denoiser.process == teacher.denoiser.process
    return denoiser if same else Under(denoiser, teacher.denoiser.process)


@lru_cache(maxsize=1)
def read_once(source: str, null_label: int | None) -> Teacher:
    """A weaker teacher: asked for at each evaluation, read once."""
    return load(source, **({} if null_label is None else {"null_label": null_label}))


def objective_of(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The objective with its networks: a student, and what else its fields name."""
    kind = recipe.kind
    adapters = recipe.adapters
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
        networks["student"] = stock.student(teacher, s.steps, s.start, s.renoise, adapter)
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
    for network in networks.values():
        network.to(device).eval()  # dropout would differ between teacher, fake and student
    keys = {k: v for k, v in recipe.objective.items() if k != "name"}
    schema = recipe.keys_schema().model_validate(keys)
    return kind(**networks, **{k: getattr(schema, k) for k in keys})  # pyright: ignore


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


def source_of(recipe: Recipe, teacher: Teacher) -> Source:
    """Data and conditions as the recipe says, encoded once: in memory, or in a cache."""
    seed, codec = recipe.train.seed, teacher.codec
    if recipe.data.source in EMBEDDED:
        return embedded_source(recipe, teacher)
    if (work := work_of(recipe, teacher)) is not None:
        return cache.source(work, recipe.data, seed)
    labels = list(range(getattr(codec, "classes", 0))) or [0]
    return Source(teacher.shape, None, codec.condition(labels), seed, len(labels))


def embedded_source(recipe: Recipe, teacher: Teacher) -> Source:
    """The digits, or drawings of the shapes, as many as the caption protocol compares with."""
    name, codec = str(recipe.data.source), teacher.codec
    classes = getattr(codec, "classes", 0)
    needed = needs_data(recipe)
    if name == "digits":
        images, numbers = digits.data()
        prompts: list[Any] = numbers.tolist()
        if classes and max(prompts) >= classes:
            raise UserError(
                f"data.source: 'digits' has label {max(prompts)}; "
                f"the teacher knows {classes} classes"
            )
    else:
        if classes or codec.condition(["a"]) is None:
            raise UserError("data.source: 'shapes' has captions, which this teacher does not read")
        prompts = shapes.all_captions() * (10 if needed else 1)
        images = shapes.draw(prompts, seed=recipe.train.seed).float() / 127.5 - 1
    if images.shape[1] != (channels := picture_shape(teacher)[0]):
        raise UserError(
            f"data.source: {name!r} has pictures of {images.shape[1]} channels; "
            f"the teacher takes {channels}"
        )
    x = codec.encode(images) if needed or name == "digits" else None
    if x is not None and x.shape[1:] != teacher.shape:
        want, got = ("×".join(map(str, s)) for s in (teacher.shape, x.shape[1:]))
        raise UserError(f"data.source: {name!r} is {got}; the teacher takes {want}")
    cond = codec.condition(prompts)
    return Source(teacher.shape, x if needed else None, cond, recipe.train.seed, len(prompts))


def needs_data(recipe: Recipe) -> bool:
    """Whether batches must hold real data, or prompts and labels will do."""
    kind = recipe.kind
    critic = kind.needs_data == "critic" and recipe.critic is not None
    return kind.needs_data == "always" or critic


def work_of(recipe: Recipe, teacher: Teacher) -> Work | None:
    """What there is to encode; None where labels are all, or data are embedded."""
    data, codec = recipe.data, teacher.codec
    if data.source in EMBEDDED:
        return None
    classes = getattr(codec, "classes", 0)
    reads_text = not classes and codec.condition([""]) is not None
    with_data, sizes = False, [(0, 0)]
    if data.source is not None:
        listing = list_images(data.source, data.captions, classes, reads_text)
        if with_data := needs_data(recipe):
            sizes = sizes_for(recipe, teacher)
            into_buckets(listing, sizes)
    elif data.prompts is not None and not classes and not reads_text:
        raise UserError(f"data.prompts: {teacher.source!r} takes no prompts; remove it")
    elif data.prompts is not None or reads_text:
        listing = list_prompts(data.prompts or "pack:starter")
    else:
        return None
    listing.check(listing.bad, listing.total, data.skip_share)
    if classes:
        listing.check_labels(classes)
    return Work(teacher, listing, sizes, with_data)


def sizes_for(recipe: Recipe, teacher: Teacher) -> list[tuple[int, int]]:
    """Heights and widths that images are cut to."""
    data = recipe.data
    _, *sides = picture_shape(teacher)
    height, width = (data.size, data.size) if data.size else sides
    factor = sides[0] // teacher.shape[-2]
    if height % factor:
        raise UserError(f"data.size: {height} is no multiple of {factor}, as the codec needs")
    if data.buckets and data.buckets.multiple % factor:
        raise UserError(
            f"data.buckets.multiple: {data.buckets.multiple} is no multiple of {factor}, "
            "as the codec needs"
        )
    return sizes_of(data.buckets, height, width)


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


def check_protocol(measure: Protocol, teacher: Teacher) -> None:
    """Refuse a protocol whose prompts the teacher cannot take, before anything is trained."""
    if measure.name == "digits" and (
        teacher.shape != (1, 8, 8) or getattr(teacher.codec, "classes", 0) != 10
    ):
        raise UserError(
            f"protocol digits measures 10 classes of 1×8×8 images, not "
            f"{'×'.join(map(str, teacher.shape))} of {getattr(teacher.codec, 'classes', 0)}; "
            "leave it out for other teachers"
        )
    if measure.name == "shapes" and (
        getattr(teacher.codec, "classes", 0) or getattr(teacher.codec, "size", None) != (32, 32)
    ):
        raise UserError(
            "protocol shapes measures 32×32 pictures of captions; leave it out for other teachers"
        )


def timed(make: Any, device: torch.device) -> tuple[torch.Tensor, float]:
    """What `make` returns, and the seconds until the device had it."""
    began = time.perf_counter()
    result = make()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began


def student_samples(
    student: Generator, teacher: Teacher, prompts: Sequence[str], seed: int
) -> Samples:
    """A student's pictures for the prompts, by the noise that a stock pipeline would draw."""
    device = next(student.parameters()).device
    x, seconds = timed(lambda: draw(student, teacher, prompts, seed), device)
    return images_to_samples(teacher.codec.decode(x), list(prompts), seconds)


@torch.no_grad()
def teacher_samples(
    recipe: Recipe, teacher: Teacher, prompts: Sequence[str], seed: int, steps: int
) -> Samples:
    """The guided teacher's pictures for the prompts, by the recipe's solver."""
    denoiser, method = guided(recipe, teacher), recipe.eval.teacher_solver
    device = next(denoiser.parameters()).device
    noise = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(seed))
    cond = teacher.codec.condition(prompts)

    def make() -> torch.Tensor:
        parts = []
        for i in range(0, len(noise), 512):
            part = cond and {k: v[i : i + 512].to(device) for k, v in cond.items()}
            parts.append(solve(denoiser, noise[i : i + 512].to(device), steps, method, part))
        return torch.cat(parts)

    x, seconds = timed(make, device)
    return images_to_samples(teacher.codec.decode(x), list(prompts), seconds)


def evaluate_student(run: Run, steps: int, seeds: int) -> dict[str, Any]:
    """The student in `steps` steps, by the run's protocol, with the weights that are in place."""
    assert run.protocol is not None
    student = run.student.at(steps)
    return run.protocol(lambda p, seed: student_samples(student, run.teacher, p, seed), seeds)


def evaluate_teacher(run: Run, steps: int, seeds: int) -> dict[str, Any]:
    """The teacher in `steps` steps of the recipe's solver, by the run's protocol."""
    assert run.protocol is not None
    found = run.protocol(
        lambda p, seed: teacher_samples(run.recipe, run.teacher, p, seed, steps), seeds
    )
    solver = run.recipe.eval.teacher_solver
    return {**found, "solver": solver, "steps": steps, "evaluations": evaluations(steps, solver)}


def finish(run: Run) -> dict[str, Any]:
    """Export the averaged student, measure it and its teacher, and write summary.json."""
    engine, recipe = run.engine, run.recipe
    engine.total_evaluations()
    summary: dict[str, Any] = {}
    if engine.accelerator.is_main_process:
        with engine.ema.swapped():
            export(run.student, run.teacher, run.out / "student", recipe.tree())
            if lora_files.possible(run.student):
                lora_files.export_lora(
                    run.student, run.teacher, run.out / "student", run.out / "lora"
                )
            summary = summarise(run, measure_all(run))
        draft = run.out / ".summary.json"
        draft.write_text(json.dumps(summary, indent=2) + "\n")
        draft.replace(run.out / "summary.json")
    engine.accelerator.wait_for_everyone()
    engine.accelerator.end_training()
    return summary


def measure_all(run: Run) -> dict[str, Any]:
    """Teacher at its full and its few steps, student at every count; empty without a protocol."""
    if run.protocol is None:
        return {}
    cfg = run.recipe.eval
    few = {str(k): evaluate_teacher(run, k, cfg.teacher_seeds) for k in TEACHER_FEW}
    students = {str(k): evaluate_student(run, k, cfg.seeds) for k in run.student.counts}
    return {
        "teacher": evaluate_teacher(run, cfg.teacher_steps, cfg.teacher_seeds),
        "teacher_few": few,
        "student": students,
    }


def summarise(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the run was, what it cost, and what came of it."""
    engine = run.engine
    device = engine.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    threads = torch.get_num_threads()
    packages = ("torch", "accelerate", "diffusers", "fewstep")
    return {
        "objective": run.recipe.objective["name"],
        "steps": engine.step,
        "seed": run.recipe.train.seed,
        "guidance": describe(guided(run.recipe, run.teacher)),
        "wall_s": engine.seconds,
        "network_evaluations": sum(engine.evaluations.values()),
        "network_evaluations_by_network": engine.evaluations,
        "metrics": metrics,
        "device": f"{device.type} ({name or platform.machine()}, {threads} threads)",
        "processes": engine.accelerator.num_processes,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
