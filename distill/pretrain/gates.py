"""`distill teach` of gates: what they decide, and the teacher's pipeline without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.data.encode import device
from distill.evaluation.finish import summarise
from distill.files import write
from distill.objectives.smaller.ecodiff import EcoDiff
from distill.objectives.smaller.tinyfusion import TinyFusion
from distill.planning.compress import Compressed, compress, summary, tables
from distill.pretrain.decoder import measure
from distill.sampling.guided_teacher import load_teacher
from distill.training import build
from distill.training.run_folder import release
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
    run = build.build(recipe, out, resume)
    run.engine.train()
    found: dict[str, Any] = {}
    if run.engine.accelerator.is_main_process:
        objective = run.engine.objective
        assert isinstance(objective, TinyFusion | EcoDiff)
        with run.engine.ema.swapped():
            smaller = objective.smaller()
        made = save(recipe, smaller, out / NAME)
        found = {**summarise(run, measure(run, where, out / NAME)), **smaller,
                 "compressed": asdict(made)}  # fmt: skip
        write(out / "summary.json", json.dumps(found, indent=2) + "\n")
        found["shown"] = [*tables(made), summary(made, out / NAME)]
    run.engine.accelerator.wait_for_everyone()
    run.engine.accelerator.end_training()
    release(out)
    return found


def save(recipe: Recipe, smaller: Mapping[str, Any], folder: Path) -> Compressed:
    """Write a copy of the teacher's pipeline without what goes.

    Args:
        smaller: `remove` and `change`, as `compress` has them.
    """
    teacher = load_teacher(recipe.teacher)  # without what was trained beside the gates
    teacher.denoiser.to(device())
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    given = {k: v for k, v in smaller.items() if k in ("remove", "change")}
    made = compress(teacher, draft, seed=recipe.train.seed, **given)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return made
