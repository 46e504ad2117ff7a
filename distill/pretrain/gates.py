"""`distill teach` of gates: what they decide, and the teacher's pipeline without it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.data.encode import device
from distill.evaluation.finish import summarise
from distill.files import write
from distill.objectives.smaller.tinyfusion import TinyFusion
from distill.planning.compress import compress, summary, tables
from distill.sampling.guided_teacher import load_teacher
from distill.training import build
from distill.training.run_folder import release
from students.architecture.score import folder_of

NAME = "pruned"  # the folder, in the run's, of the pipeline with the smaller network


def teach_gates(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train the gates of a checked recipe, and save `out`/pruned: the teacher's folder without the
    units that they leave out, its weights being the teacher's own.

    Returns:
        The content of summary.json: `removed` names the units, `likeliest` has the probability of
        each group's choice, and `compressed` what the smaller network weighs and takes.

    Raises:
        UserError: as `build.build`, or the teacher is no folder of a pipeline.
    """
    folder_of(recipe.teacher.source)
    run = build.build(recipe, out, resume)
    run.engine.train()
    found: dict[str, Any] = {}
    if run.engine.accelerator.is_main_process:
        objective = run.engine.objective
        assert isinstance(objective, TinyFusion)
        with run.engine.ema.swapped():
            gone = objective.gates.removed()
            likeliest = objective.gates.probabilities().amax(1).tolist()
        teacher = load_teacher(recipe.teacher)  # without what was trained beside the gates
        teacher.denoiser.to(device())
        draft = out / f".{NAME}"
        shutil.rmtree(draft, ignore_errors=True)
        made = compress(teacher, draft, remove=gone, seed=recipe.train.seed)
        shutil.rmtree(out / NAME, ignore_errors=True)
        os.replace(draft, out / NAME)
        found = {**summarise(run, {}), "removed": gone, "likeliest": likeliest,
                 "compressed": asdict(made)}  # fmt: skip
        write(out / "summary.json", json.dumps(found, indent=2) + "\n")
        found["shown"] = [*tables(made), summary(made, out / NAME)]
    run.engine.accelerator.wait_for_everyone()
    run.engine.accelerator.end_training()
    release(out)
    return found
