"""`distill teach` of a light decoder: trained, put into the pipeline, compared with the large."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.config.recipe import Recipe
from distill.objectives.smaller.decoder import LightDecoder
from distill.pretrain.part import draft_of, teach_part
from distill.sampling.student_sampler import evaluate_student, timed
from distill.training import build
from students.architecture.score import folder_of
from students.export.folder import SIDECAR, load_student
from teachers.families.base import quiet

NAME = "student"  # the folder, in the run's, of the pipeline with the light decoder
COMPARED = 64  # latents that the two decoders are compared on


def teach_decoder(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train the decoder of a checked recipe, and save `out`/student: the teacher's folder with it.

    Returns:
        The content of summary.json: `decoder` compares the two; `metrics` are the student's with
        the large decoder (`against`) and with the light one (`student`), if it is a student.

    Raises:
        UserError: as `build.build`, or the teacher is no folder of a pipeline.
    """
    where = folder_of(recipe.teacher.source, "vae/config.json")

    def finish(run: build.Run) -> dict[str, Any]:
        objective = run.engine.objective
        assert isinstance(objective, LightDecoder)
        tiny = objective.decoder.tiny
        compared = compare(run, tiny)
        save(tiny, where, out / NAME)
        return {"metrics": measure(run, where, out / NAME), "decoder": compared}

    return teach_part(recipe, out, resume, finish)


def save(tiny: Any, where: Path, folder: Path) -> None:
    """Write a copy of a pipeline's folder in which the autoencoder is the light one."""
    with draft_of(folder) as draft:
        shutil.copytree(where, draft, ignore=shutil.ignore_patterns("vae"))
        with quiet():
            tiny.save_pretrained(draft / "vae")
        file = draft / "model_index.json"
        index = json.loads(file.read_text(encoding="utf-8"))
        index["vae"] = ["diffusers", type(tiny).__name__]
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def compare(run: build.Run, tiny: Any) -> dict[str, Any]:
    """The two decoders on the same latents of data: agreement, weights, and seconds of a batch."""
    device = next(tiny.parameters()).device
    x = run.engine.source.batch(0, 0, 1, min(COMPARED, run.engine.source.size)).data.to(device)
    vae: Any = run.teacher.codec.vae
    vae.to(device)
    large, light = run.teacher.codec.decode(x), tiny.decode(x).sample
    error = ((large - light) / 2).square().mean()
    seconds = {
        name: min(timed(partial(decode, x), device)[1] for _ in range(3))
        for name, decode in (("large", run.teacher.codec.decode), ("light", tiny.decode))
    }
    weights = {"large": vae.decoder, "light": tiny.decoder}
    return {
        "psnr_db": (-10 * error.log10()).item(),
        "weights": {k: sum(p.numel() for p in v.parameters()) for k, v in weights.items()},
        "seconds": seconds,
        "batch": len(x),
    }


def measure(run: build.Run, where: Path, folder: Path) -> dict[str, Any]:
    """Figures of the student with either decoder; empty without a protocol or of no student."""
    if run.protocol is None or not (where / SIDECAR).is_file():
        return {}
    found: dict[str, Any] = {}
    for name, place in (("against", where), ("student", folder)):
        generator, teacher = load_student(place)
        found[name] = {
            str(k): evaluate_student(generator.at(k), teacher, run.protocol, run.recipe.eval.seeds)
            for k in generator.counts
        }
    return found
