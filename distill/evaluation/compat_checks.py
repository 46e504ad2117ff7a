"""The checks of `distill compat`: files are read and options tried before a picture is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.config.paths import from_start
from distill.config.recipe import Recipe
from distill.config.renamed import current_names
from distill.console import print_notice
from distill.data.encode import counting, picture_shape, print_cuts
from distill.data.prompts import pack
from distill.evaluation import style_figures as figures
from distill.publish.results_table import advised, steps_of
from distill.report.page import intact, read_summary
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import conditioning
from eval.errors import MetricError
from eval.metrics.base import Metric
from eval.metrics.features import EXTRACTORS
from eval.protocols import spec
from eval.samples import Samples
from eval.shapes import all_captions
from eval.text import decoded, lines
from students.export.folder import SIDECAR, load_student, student_folder
from students.export.lora_files import COMFYUI, DIFFUSERS, TURBO
from teachers.adapters.files import LoRAFile, Pair
from teachers.catalogue.loading import pictures_of
from teachers.errors import UserError, clipped, nearest, without_notes
from teachers.quantised import FORMS
from teachers.storage.files import read_json
from teachers.teacher import Teacher

OWN = ("teacher_steps", "teacher_solver", "protocol")  # keys of a run's eval section
TURBO_FILES = (TURBO[DIFFUSERS], DIFFUSERS, TURBO[COMFYUI], COMFYUI)  # the first there is, is read
ERROR = re.compile(r"teacher\.adapters(?:\.(\d+)(?:\.file)?)?: (.+)", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """The arguments of `distill compat`.

    Attributes:
        student: A finished run's folder, or a student's.
        strengths: At which each LoRA is added.
        prompts: A text file with one on each line; None for the evaluation protocol's.
        samples: How many pictures each model draws; prompts repeat in turn.
        steps: Of the student; None for the count with the best figures.
        teacher: Its source, if it is not where the recipe says; else None.
        features: Of the eval package, or "pixels"; None for the protocol's.
    """

    student: Path
    loras: tuple[Path, ...]
    strengths: tuple[float, ...]
    prompts: Path | None
    samples: int
    steps: int | None
    teacher: str | None
    features: str | None


@dataclass(frozen=True)
class Comparison:
    """What is compared, after all checks.

    Attributes:
        recipe: Of the run; only its teacher and evaluation are used.
        prompts: One for each picture.
        files: The LoRA files, fitted to the teacher.
        turbo: The layers of the student's own LoRA; none if it has no file of it.
        rule: The features, in words.
        score: Of pictures and prompts; None if the protocol has none.
    """

    request: Request
    recipe: Recipe
    steps: int
    prompts: list[str]
    files: tuple[LoRAFile, ...]
    turbo: tuple[Pair, ...]
    features: figures.Features
    rule: str
    score: Metric | None

    @property
    def variants(self) -> list[tuple[int, float]]:
        """Each LoRA's number, at each strength."""
        return [(i, s) for i in range(len(self.files)) for s in self.request.strengths]


def prepared(request: Request) -> Comparison:
    """The comparison, with every file read and every option checked.

    Raises:
        UserError: naming what does not fit.
    """
    refuse_pictures(request)
    for path in request.loras:
        if not path.is_file():
            raise UserError(f"LORA {clipped(path)}: no such file; give a .safetensors file")
    recipe = recipe_of(request)
    everything = at_strength(request.loras, 0.0)
    with refusals(request), without_notes():
        generator, student = load_student(request.student, precision_of(recipe), everything)
    steps = step_count(request, generator.counts)
    features, rule, score = measures(request, recipe)
    prompts = prompts_for(request, recipe, student)
    with counting(student) as cuts:
        student.codec.condition(list(dict.fromkeys(prompts)))
    score = tried(features, score, picture_shape(student), prompts)
    del generator, student
    own = turbo_file(request.student)
    extra = [*everything, *at_strength([own] if own else [], 0.0)]
    first = len(recipe.teacher.adapters or ())
    with refusals(request, first), without_notes():
        teacher = load_teacher(with_files(recipe, extra).teacher)
    by_key = {f.key: f for f in teacher.fusion.files}
    files = [by_key[f"teacher.adapters.{first + i}.file"] for i in range(len(extra))]
    turbo = files.pop().pairs if own else ()
    print_cuts(cuts, "--prompts")
    return Comparison(
        request, recipe, steps, prompts, tuple(files), turbo, features, rule, score
    )  # fmt: skip


def refuse_pictures(request: Request) -> None:
    """Refuse a student that takes a picture with each prompt, before it is loaded.

    Raises:
        UserError: it is one.
    """
    if pictures_of(str(student_folder(request.student))):
        raise UserError(
            f"student {clipped(request.student)!r}: it takes a picture with each prompt, and "
            "compat draws from prompts alone; give a student of a text-to-image model"
        )


def recipe_of(request: Request) -> Recipe:
    """The teacher and the evaluation of the student's recipe, as a recipe of their own.

    Raises:
        UserError: the student's folder does not say, or the teacher is a function of one's own.
    """
    folder = student_folder(request.student)
    who = f"student {clipped(request.student)!r}"
    tree = read_json(folder / SIDECAR, who).get("recipe")
    if not isinstance(tree, dict) or not isinstance(tree.get("teacher"), dict):
        raise UserError(f"{who}: {SIDECAR} has no recipe, so its teacher is unknown; export again")
    tree = from_start(current_names(tree, quiet=True), folder.parent)
    section = {**tree["teacher"], **({"source": request.teacher} if request.teacher else {})}
    told = tree.get("eval") or {}
    evaluation = {k: told[k] for k in OWN if told.get(k) is not None}
    if evaluation.get("protocol") not in spec.names():
        evaluation.pop("protocol", None)
        if section["source"] in spec.names():
            evaluation["protocol"] = section["source"]
    unused = {"objective": {"name": "sid"}, "adapters": {}, "train": {"steps": 1}}
    return Recipe.check({"teacher": section, "eval": evaluation, **unused}, who)


def precision_of(recipe: Recipe) -> Any:
    """Of the student's weights: the teacher's own, or bf16 if that is quantised."""
    precision = recipe.teacher.precision
    return "bf16" if precision in FORMS else precision


def at_strength(paths: Sequence[Path], strength: float) -> list[dict[str, Any]]:
    """Entries of `teacher.adapters`."""
    return [{"file": str(p), "strength": strength} for p in paths]


def with_files(recipe: Recipe, adapters: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe with further LoRA files in its teacher."""
    section = recipe.teacher.model_dump()
    section["adapters"] = [*(section["adapters"] or ()), *adapters]
    teacher = type(recipe.teacher).model_validate(section)
    return recipe.model_copy(update={"teacher": teacher})


@contextmanager
def refusals(request: Request, first: int = 0) -> Iterator[None]:
    """Within it, errors about keys of `teacher.adapters` name the command's arguments.

    Args:
        first: How many LoRA files the recipe itself has.
    """
    try:
        yield
    except UserError as error:
        match = ERROR.fullmatch(str(error))
        if match is None or (match[1] and int(match[1]) < first):
            raise
        if match[1] is None:
            raise UserError(
                f"student {clipped(request.student)!r}: its pipeline takes no LoRA files; give a "
                "student of a text-to-image pipeline or of DiT"
            ) from None
        raise UserError(f"LORA: {match[2]}") from None


def step_count(request: Request, counts: Sequence[int]) -> int:
    """The student's step count.

    Raises:
        UserError: it has no such count.
    """
    if request.steps is None:
        summary = request.student / "summary.json"
        with intact(summary):
            return advised(counts, read_summary(request.student) if summary.is_file() else {})
    if request.steps not in counts:
        raise UserError(
            f"--steps {request.steps}: this student was trained for {steps_of(counts)}; give those"
        )
    return request.steps


def prompts_for(request: Request, recipe: Recipe, student: Teacher) -> list[str]:
    """A prompt or label for each picture.

    Raises:
        UserError: the file cannot be read, or the student takes no prompts.
    """
    kind = conditioning(student)
    if request.prompts is not None:
        distinct = lines_of(request.prompts)
        if kind == "nothing":
            raise UserError("--prompts: this student takes none; leave the option out")
    elif kind == "captions":
        distinct = usual_captions(recipe)
    else:
        distinct = [str(i) for i in range(student.codec.classes or 1)]
    n = request.samples
    if request.prompts is None and len(distinct) > n:
        distinct = [distinct[i * len(distinct) // n] for i in range(n)]
    return [distinct[i % len(distinct)] for i in range(n)]


def lines_of(path: Path) -> list[str]:
    """The prompts of a text file.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        prompts = [line.strip() for line in lines(decoded(path.read_bytes()))]
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}; give a text file") from None
    except ValueError as error:
        raise UserError(f"--prompts {path}: it {error}") from None
    if not any(prompts):
        raise UserError(f"--prompts {path}: it holds no prompts; write one on each line")
    return [p for p in prompts if p]


def usual_captions(recipe: Recipe) -> list[str]:
    """The captions of the embedded shapes, or else those of a pack."""
    if recipe.eval.protocol == "shapes":
        return all_captions()
    return lines(pack("starter").read_text(encoding="utf-8"))


def measures(request: Request, recipe: Recipe) -> tuple[figures.Features, str, Metric | None]:
    """The features, what they are in words, and the prompt score.

    Raises:
        UserError: there are no such features.
    """
    name, protocol = request.features, recipe.eval.protocol
    written = None if protocol is None else spec.spec(spec.FOLDER / f"{protocol}.yaml")
    score = None if written is None else written.prompt_score(str(protocol))
    if name is None and written is not None and (found := written.feature_requests(str(protocol))):
        return found[0].features, found[0].features.rule, score
    if name is None or name == figures.PIXELS:
        rule = f"pixels averaged to {figures.SIDE}×{figures.SIDE}"
        return figures.pooled_pixels, rule, score
    if name not in EXTRACTORS:
        raise UserError(f"--features {name}: {nearest(name, [*EXTRACTORS, figures.PIXELS])}")
    return EXTRACTORS[name], EXTRACTORS[name].rule, score


def tried(
    features: figures.Features, score: Metric | None, shape: Sequence[int], prompts: list[str]
) -> Metric | None:
    """The prompt score, if grey pictures have one; else None, and a line says why.

    Raises:
        MetricError: the features of grey pictures cannot be computed.
    """
    some = list(dict.fromkeys(prompts))
    grey = torch.full((len(some), shape[0], *shape[-2:]), 128, dtype=torch.uint8)
    features(grey[:2])
    try:
        if score is not None:
            score(Samples(grey, some))
    except MetricError as error:
        print_notice(f"no prompt score: {error}")
        return None
    return score


def turbo_file(folder: Path) -> Path | None:
    """The student's own LoRA, in its run's folder or beside its weights; None without one."""
    folder = student_folder(folder)
    places = [place / name for name in TURBO_FILES
              for place in (folder / "lora", folder.parent / "lora", folder)]  # fmt: skip
    return next((p for p in places if p.is_file()), None)
