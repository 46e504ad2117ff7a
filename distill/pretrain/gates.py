"""`distill teach` of gates: what they decide, and the teacher's pipeline without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.data.encode import device
from distill.objectives.smaller.ecodiff import EcoDiff
from distill.objectives.smaller.tinyfusion import TinyFusion
from distill.planning.compress import Compressed, compress, summary, tables
from distill.pretrain.decoder import measure
from distill.pretrain.part import draft_of, teach_part
from distill.sampling.guided_teacher import load_teacher
from distill.training import build
from students.architecture.score import folder_of

NAME = "pruned"  # the folder, in the run's, of the pipeline with the smaller network


def teach_gates(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train the gates of a checked recipe, and save `out`/pruned: the teacher's folder without the
    units, heads or neurons that they leave out, its weights being the teacher's own.

    Returns:
        The content of summary.json: `remove` names the units that go, or `change` the layers that
        keep less; `compressed` is what the smaller network weighs and takes; `metrics` are those of
        the teacher's folder (`against`) and of the smaller one (`student`), if it is a student's.

    Raises:
        UserError: as `build.build`, or the teacher is no folder of a pipeline.
    """
    where = folder_of(recipe.teacher.source)
    shown: list[Any] = []  # for the terminal: JSON does not hold tables

    def finish(run: build.Run) -> dict[str, Any]:
        objective = run.engine.objective
        assert isinstance(objective, TinyFusion | EcoDiff)
        smaller = objective.smaller()
        made = save(recipe, smaller, out / NAME)
        shown.extend([*tables(made), summary(made, out / NAME)])
        metrics = measure(run, where, out / NAME)
        return {"metrics": metrics, **smaller, "compressed": asdict(made)}

    found = teach_part(recipe, out, resume, finish)
    return {**found, "shown": shown} if shown else found


def save(recipe: Recipe, smaller: Mapping[str, Any], folder: Path) -> Compressed:
    """Write a copy of the teacher's pipeline without what goes.

    Args:
        smaller: `remove` and `change`, as `compress` has them.
    """
    teacher = load_teacher(recipe.teacher)  # without what was trained beside the gates
    teacher.denoiser.to(device())
    given = {k: v for k, v in smaller.items() if k in ("remove", "change")}
    with draft_of(folder) as draft:
        return compress(teacher, draft, seed=recipe.train.seed, **given)
