"""`distill teach` of a guide: trained, put beside its teacher, saved, and measured with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from distill.config.recipe import Recipe
from distill.objectives.smaller.guide import Beside, Guide
from distill.pretrain.part import draft_of, teach_part
from distill.sampling.teacher_sampler import evaluate_teacher
from distill.training import build
from eval.protocols.measure import Protocol
from students.architecture.units import size_of
from students.export.folder import TOLERANCE, ExportError, drawn_apart, prompts_of
from students.export.portable import make_portable
from students.lora import network_of
from teachers.families.base import images_of, quiet
from teachers.storage.files import open_to_readers
from teachers.teacher import Teacher

NAME = "guided"  # the folder, in the run's, of the pipeline with the guide
CHECKED = 4  # steps of the pictures that another process draws too


def teach_guide(recipe: Recipe, out: Path, resume: bool) -> dict[str, Any]:
    """Train the guide of a checked recipe, and save `out`/guided: the teacher's pipeline with it.

    Returns:
        The content of summary.json: `guide` has its number of weights and the base's; the metrics
        are those of `measure`.

    Raises:
        UserError: as `build.build`.
        ExportError: stock diffusers draws other pictures from the folder.
    """

    def finish(run: build.Run) -> dict[str, Any]:
        objective = run.engine.objective
        assert isinstance(objective, Guide)
        controlnet = objective.guide.controlnet
        save(run.teacher, controlnet, out / NAME)
        metrics = measure(recipe, run.teacher, controlnet, run.protocol)
        weights = {"guide": controlnet, "base": network_of(run.teacher.denoiser).backbone}
        return {"metrics": metrics, "guide": {k: size_of(v) for k, v in weights.items()}}

    return teach_part(recipe, out, resume, finish)


def pipeline(teacher: Teacher, controlnet: Any) -> Any:
    """The stock pipeline of a teacher with a ControlNet beside its network."""
    from diffusers import StableDiffusionControlNetPipeline

    codec: Any = teacher.codec
    network = network_of(teacher.denoiser)
    parts = {**codec.pipe.components, "unet": network.backbone, "controlnet": controlnet}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


def arguments_of(teacher: Teacher, prompts: list[Any]) -> dict[str, Any]:
    """The pipeline's arguments for prompts: no guidance of its own, and blank images."""
    codec: Any = teacher.codec
    height, width = codec.size[-2:]
    blank = [Image.new("RGB", (width, height)) for _ in prompts]
    return {**codec.arguments(prompts), "image": blank}


@torch.no_grad()
def save(teacher: Teacher, controlnet: Any, folder: Path) -> None:
    """Write the pipeline with the guide; the folder appears only if another process draws from it
    what this one draws.

    Raises:
        ExportError: it does not.
    """
    pipe, prompts = pipeline(teacher, controlnet), prompts_of(teacher)
    device = next(controlnet.parameters()).device
    pipe.to(device).set_progress_bar_config(disable=True)
    with draft_of(folder) as draft:
        with quiet():
            pipe.save_pretrained(draft)
        make_portable(draft, teacher.codec.folder)
        open_to_readers(draft)
        rng, arguments = torch.Generator().manual_seed(0), arguments_of(teacher, prompts)
        keys = {"num_inference_steps": CHECKED, "output_type": "pt"}
        ours = images_of(pipe(generator=rng, **keys, **arguments)).float().cpu()
        job = {"counts": [CHECKED], "absent": [], "device": device.type, "own": False,
               "seeded": True}  # fmt: skip
        theirs = drawn_apart(draft, job, arguments, "the folder with the guide")[str(CHECKED)]
        if (worst := (ours - theirs).abs().max().item()) > TOLERANCE:
            raise ExportError(f"the exported pipeline differs by {worst:.2g} at a pixel's range")


def measure(
    recipe: Recipe, teacher: Teacher, controlnet: Any, protocol: Protocol | None
) -> dict[str, Any]:
    """Figures of the guided teacher (`teacher`), of its one evaluation with the guide (`guide`) and
    without it (`base`), on the same noise; empty without a protocol or seeds.

    The teacher may be another than the guide was trained with.
    """
    seeds, steps = recipe.eval.teacher_seeds, recipe.eval.teacher_steps
    if protocol is None or not seeds:
        return {}
    plain = recipe.model_copy(
        update={"teacher": recipe.teacher.model_copy(update={"guidance": 1.0})}
    )
    network: Any = network_of(teacher.denoiser)
    both = replace(
        teacher, denoiser=network.twin(Beside(network, controlnet), network.schedule).eval()
    )
    return {
        name: evaluate_teacher(of, who, protocol, steps, seeds)
        for name, of, who in (
            ("teacher", recipe, teacher),
            ("guide", plain, both),
            ("base", plain, teacher),
        )
    }
