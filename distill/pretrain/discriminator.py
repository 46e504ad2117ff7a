"""`distill teach` of a discriminator: trained, saved, and measured with its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.config.schema import DiscriminatorSection
from distill.objectives.adversarial.discriminator import Discriminator
from distill.pretrain.part import teach_part
from distill.sampling.discriminator import NAME, save
from distill.sampling.teacher_sampler import evaluate_teacher
from distill.training import build


def teach_discriminator(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train the critic of a checked recipe, and save it as `out`/critic.safetensors.

    Returns:
        The content of summary.json. Its metrics are the teacher's, with the discriminator as
        `teacher` and without it as `teacher_alone`; empty without a protocol.

    Raises:
        UserError: as `build.build`.
    """

    def finish(run: build.Run) -> dict[str, Any]:
        objective = run.engine.objective
        assert isinstance(objective, Discriminator)
        save(
            objective.critic,
            run.teacher,
            out / NAME,
            interval=[objective.times.least, objective.times.most],
            guidance=recipe.tree()["teacher"]["guidance"],
            objective=recipe.objective,
            steps=run.engine.step,
        )
        return {"metrics": measure(run)}

    return teach_part(recipe, out, resume, finish)


def measure(run: build.Run) -> dict[str, Any]:
    """Figures of the teacher with the discriminator and without it, on the same noise."""
    seeds, steps = run.recipe.eval.teacher_seeds, run.recipe.eval.teacher_steps
    if run.protocol is None or not seeds:
        return {}
    section = DiscriminatorSection(file=str(run.out / NAME))
    moved = run.recipe.teacher.model_copy(update={"discriminator": section})
    recipes = {"teacher": run.recipe.model_copy(update={"teacher": moved}),
               "teacher_alone": run.recipe}  # fmt: skip
    return {
        name: evaluate_teacher(recipe, run.teacher, run.protocol, steps, seeds)
        for name, recipe in recipes.items()
    }
