"""`distill teach` of inner loop feedback: trained, put into the teacher's pipeline, compared."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from distill.config.recipe import Recipe
from distill.objectives.smaller.ilf import InnerLoopFeedback
from distill.pretrain.decoder import NAME
from distill.pretrain.part import draft_of, teach_part
from distill.sampling.teacher_sampler import SolverSampler, shallow_share
from distill.training import build
from students.architecture.score import folder_of
from students.export.folder import SIDECAR, ExportError, drawn_elsewhere, prompts_of
from students.lora import unwrap
from teachers.errors import UserError
from teachers.families.base import Prompted, quiet
from teachers.reduced import source
from teachers.reduced.deepcache import DeepCache
from teachers.reduced.feedback import Feedback, FeedbackUNet2DConditionModel
from teachers.reduced.network import INTERVAL, WIDTH
from teachers.teacher import Teacher

OF_TEACHER = ("README.md", "measurements.json")  # files that say how good the teacher's are
TOLERANCE = 1e-3  # of a pixel in [0, 1]


def teach_feedback(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train the block of a checked recipe, and save `out`/student: the teacher's folder with it.

    Returns:
        The content of summary.json. Its metrics are those of the sampler's steps with the block
        (`student`), without it (`against`), and of fewer whole steps (`fewer`).

    Raises:
        UserError: as `build.build`; or the teacher is no folder of a pipeline, or a student.
        ExportError: diffusers draws other pictures from the folder.
    """
    where = folder_of(recipe.teacher.source, "unet/config.json")
    if (where / SIDECAR).is_file():
        raise UserError(
            "teacher.source: it is a student of few steps, which differ too much to share work; "
            "give its teacher"
        )

    def finish(run: build.Run) -> dict[str, Any]:
        objective = run.engine.objective
        assert isinstance(objective, InnerLoopFeedback)
        feedback: Any = objective.feedback.carry
        save(feedback, run.teacher, objective, where, out / NAME)
        verify(out / NAME, feedback, run.teacher, objective)
        return {"metrics": measure(run, objective, feedback)}

    return teach_part(recipe, out, resume, finish)


def save(
    feedback: Feedback, teacher: Teacher, objective: InnerLoopFeedback, where: Path, folder: Path
) -> None:
    """Write a copy of a pipeline's folder whose network carries its inner levels on."""
    before: Any = objective.feedback.unet[0]
    own = {INTERVAL: objective.interval, WIDTH: objective.width}
    made: Any = FeedbackUNet2DConditionModel.from_config({**before.config, **own})
    weights = {f"feedback.{k}": v for k, v in feedback.state_dict().items()}
    made.load_state_dict({**before.state_dict(), **weights})
    with draft_of(folder) as draft:
        shutil.copytree(where, draft, ignore=shutil.ignore_patterns("unet", *OF_TEACHER))
        with quiet():
            made.save_pretrained(draft / "unet")
        source.write(draft, "unet", made)


@torch.no_grad()
def verify(
    folder: Path, feedback: Feedback, teacher: Teacher, objective: InnerLoopFeedback
) -> None:
    """Compare the pictures that diffusers draws from the folder, in another process, with ours.

    Raises:
        ExportError: they differ by more than rounding, or the process fails.
    """
    codec, steps = teacher.codec, objective.steps
    assert isinstance(codec, Prompted)
    prompts = prompts_of(teacher)
    arguments = {**codec.arguments([*prompts]), "guidance_scale": 2.0}
    network = unwrap(teacher.denoiser)
    found = drawn_elsewhere(folder, network, teacher, (steps,), arguments, own=True)
    theirs = found[str(steps)]
    backbone, pipe = objective.feedback.unet[0], codec.pipe
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    with DeepCache(backbone, objective.interval, feedback):
        ours = pipe(num_inference_steps=steps, generator=rng, output_type="pt", **arguments)[0]
    if (worst := (ours.cpu() - theirs).abs().max().item()) > TOLERANCE:
        raise ExportError(f"the exported pipeline differs from ours by {worst:.2g} at a pixel")


def measure(
    run: build.Run, objective: InnerLoopFeedback, feedback: Feedback
) -> dict[str, dict[str, Any]]:
    """Figures with the block, without it, and of the fewest whole steps of at least its work."""
    seeds, steps = run.recipe.eval.teacher_seeds, objective.steps
    if run.protocol is None or not seeds:
        return {}

    def figures(count: int, cache: int = 1, carry: Feedback | None = None) -> dict[str, Any]:
        solver = run.recipe.eval.teacher_solver
        sampler = SolverSampler(run.recipe, run.teacher, solver, "own", count, [], cache=cache)
        if carry is not None and sampler.deep_cache is not None:
            sampler.deep_cache.feedback = carry
            sampler.shallow_share = shallow_share(run.teacher, carry)
        return run.protocol(sampler, seeds)  # pyright: ignore[reportOptionalCall]

    share = shallow_share(run.teacher, feedback)
    fewer = math.ceil(steps / objective.interval * (1 + (objective.interval - 1) * share))
    return {
        "student": {str(steps): figures(steps, objective.interval, feedback)},
        "against": {str(steps): figures(steps, objective.interval)},
        "fewer": {str(k): figures(k) for k in (fewer - 1, fewer, steps)},
    }
