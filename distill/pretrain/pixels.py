"""`distill teach`: train a small teacher from scratch, saved as a diffusers folder.

A teacher recipe has no `teacher`, but two other sections: `network`, the configuration of a
UNet2DModel, and `scheduler`, the configuration of the diffusers scheduler that defines its process.
A recipe with `text_encoder` describes a text-to-image pipeline; text_to_image.py trains that. One
with a `teacher` and the objective `discriminator` trains a discriminator of it: discriminator.py;
one with the objective `decoder`, a light decoder of it: decoder.py; one with `tinyfusion` or
`ecodiff`, what of its network can go: gates.py; one with `ilf`, what carries its inner levels on
from step to step: feedback.py; one with `guide`, a guide beside it: guide.py.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from distill.config.recipe import Recipe, override, read_recipe
from distill.data.encode import device
from distill.evaluation.finish import summarise
from distill.files import write
from distill.objectives.adversarial.discriminator import Discriminator
from distill.objectives.smaller.decoder import LightDecoder
from distill.objectives.smaller.ecodiff import EcoDiff
from distill.objectives.smaller.guide import Guide
from distill.objectives.smaller.ilf import InnerLoopFeedback
from distill.objectives.smaller.tinyfusion import TinyFusion
from distill.pretrain import text_to_image
from distill.pretrain.decoder import teach_decoder
from distill.pretrain.discriminator import teach_discriminator
from distill.pretrain.feedback import teach_feedback
from distill.pretrain.gates import teach_gates
from distill.pretrain.guide import teach_guide
from distill.pretrain.text_to_image import Scenes, TextRecipe
from distill.profiling import device_name
from distill.publish.results_table import many
from distill.sampling.guided_teacher import share_times
from distill.sampling.teacher_sampler import evaluate_teacher
from distill.seeds import seed_all
from distill.training import build, run_folder
from distill.training.run_folder import release
from eval import catalogue, shapes
from eval.protocols.measure import floor, images_to_samples, protocol
from eval.samples import Samples
from teachers.catalogue.loading import load
from teachers.errors import UserError, nearest
from teachers.families.unet import UNet
from teachers.storage.diffusers_config import read as read_schedule
from teachers.storage.files import open_to_readers, read_json

# What is trained of a teacher that is there: by the objective's class.
PARTS = {
    Discriminator: teach_discriminator,
    LightDecoder: teach_decoder,
    TinyFusion: teach_gates,
    EcoDiff: teach_gates,
    InnerLoopFeedback: teach_feedback,
    Guide: teach_guide,
}
STEPS = (1, 2, 4, 8, 32)  # solver steps for which the card states the teacher's quality


def teach(path: str, out: Path, overrides: list[str], resume: bool) -> dict[str, Any]:
    """Train the teacher of a recipe, and save it in `out`/teacher; or a teacher's discriminator.

    Raises:
        UserError: the recipe, the network or the scheduler has a wrong key or value.
    """
    tree = override(read_recipe(path), overrides)
    if "text_encoder" in tree:
        return teach_pictures(TextRecipe.check(tree, path), out, resume, path)
    if (part := part_of(tree, path)) is not None:
        recipe, teach_it = part
        return teach_it(recipe, out, resume)
    for section in ("network", "scheduler"):
        if not isinstance(tree.get(section), dict):
            raise UserError(f"{path}: {section}: missing; add the section to the teacher recipe")
    network, scheduler = tree.pop("network"), tree.pop("scheduler")
    objective = tree.get("objective")
    null_label = objective.get("null_label") if isinstance(objective, dict) else None
    first = out / ".untrained"
    tree["teacher"] = {"source": str(first), "null_label": null_label}
    recipe = Recipe.check(tree, path)
    if recipe.kind.few_step:
        raise UserError(f"{path}: objective.name: a teacher has another objective; set 'diffusion'")
    pipe = pipeline(network, scheduler, recipe.train.seed, path)
    classes = pipe.unet.config.num_class_embeds or 0
    if recipe.objective["drop"] and not recipe.objective["null_label"] < classes:
        raise UserError(
            f"{path}: objective.null_label: the network has {classes} classes; set a lower label"
        )
    run_folder.check_folder(recipe, out, resume)
    keep(pipe, first, path)
    run = build.build(recipe, out, resume)
    run.engine.train()
    summary: dict[str, Any] = {}
    if run.engine.accelerator.is_main_process:
        with run.engine.ema.swapped():
            network: Any = run.student.denoiser
            pipe.unet.load_state_dict(network.backbone.state_dict())
        draft = out / ".teacher"
        shutil.rmtree(draft, ignore_errors=True)
        pipe.save_pretrained(draft)
        open_to_readers(draft)
        shutil.rmtree(out / "teacher", ignore_errors=True)
        os.replace(draft, out / "teacher")
        run.teacher = load(str(out / "teacher"), null_label=null_label)
        if recipe.student.share_times is not None:
            share_times(run.teacher.denoiser, recipe.student.share_times, "student")
        summary = summarise(run, measure(run))
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "teacher" / "README.md").write_text(card(summary, recipe), encoding="utf-8")
    run.engine.accelerator.wait_for_everyone()
    run.engine.accelerator.end_training()
    release(out)
    return summary


def part_of(tree: dict[str, Any], where: str) -> tuple[Recipe, Any] | None:
    """A recipe's tree as that of a part of a teacher, and what trains it; None of other recipes.

    Raises:
        UserError: one of its keys is wrong.
    """
    if "teacher" not in tree or "network" in tree:
        return None
    recipe = Recipe.check(tree, where)
    found = [teach_it for kind, teach_it in PARTS.items() if issubclass(recipe.kind, kind)]
    return (recipe, found[0]) if found else None


def keep(pipe: Any, folder: Path, where: str) -> None:
    """Save the untrained pipeline in `folder`; an existing one must be the same."""
    if folder.exists():
        for part, config in (("unet", pipe.unet.config), ("scheduler", pipe.scheduler.config)):
            name = "config.json" if part == "unet" else "scheduler_config.json"
            before = read_json(folder / part / name, where)
            now = json.loads(json.dumps(dict(config), default=list))
            wrong = [k for k, v in now.items() if not k.startswith("_") and before.get(k) != v]
            if wrong:
                section = "network" if part == "unet" else part
                raise UserError(
                    f"{where}: {section}.{wrong[0]}: it differs from the run in {folder.parent}; "
                    "restore it, or choose another folder"
                )
        return
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")  # each process its own
    pipe.save_pretrained(draft)
    open_to_readers(draft)
    try:
        os.replace(draft, folder)
    except OSError:  # another process was first
        shutil.rmtree(draft, ignore_errors=True)


def pipeline(network: dict[str, Any], scheduler: dict[str, Any], seed: int, where: str) -> Any:
    """An untrained pipeline with the two configurations."""
    import diffusers

    known = set(inspect.signature(diffusers.UNet2DModel.__init__).parameters)
    if wrong := [k for k in network if k not in known]:
        raise UserError(f"{where}: network.{wrong[0]}: unknown key; {nearest(wrong[0], known)}")
    config = dict(scheduler)
    kind = getattr(diffusers, str(config.pop("class", "")), None)
    if kind is None:
        raise UserError(f"{where}: scheduler.class: expected the name of a diffusers scheduler")
    known = set(inspect.signature(kind.__init__).parameters)
    if wrong := [k for k in config if k not in known]:
        raise UserError(f"{where}: scheduler.{wrong[0]}: unknown key; {nearest(wrong[0], known)}")
    seed_all(seed, "network")
    try:
        unet = diffusers.UNet2DModel(**network)
    except Exception as error:  # diffusers raises many types for a wrong size
        raise UserError(f"{where}: network: {error}; correct the section") from None
    try:
        stock = kind(**config)
        UNet(unet, read_schedule(kind.__name__, dict(stock.config), f"{where}: scheduler"))
        return diffusers.ConsistencyModelPipeline(unet=unet, scheduler=stock)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: scheduler: {error}; correct the section") from None


def measure(run: build.Run) -> dict[str, Any]:
    """Results of the teacher for each number of solver steps, and of real data (the floor)."""
    if run.protocol is None:
        return {}
    seeds = run.recipe.eval.teacher_seeds
    few = {str(k): evaluate_teacher(run.recipe, run.teacher, run.protocol, k, seeds) for k in STEPS}
    steps = run.recipe.eval.teacher_steps
    best = evaluate_teacher(run.recipe, run.teacher, run.protocol, steps, seeds)
    return {"teacher": best, "teacher_few": few, "floor": floor(run.protocol.name)}


def card(summary: dict[str, Any], recipe: Recipe) -> str:
    """The README of a trained teacher: data, cost, quality."""
    metrics = summary["metrics"]
    rows, keys = "", ("fd", "precision", "recall", "coverage", "accuracy")
    if metrics:
        table = {**metrics["teacher_few"], f"{metrics['teacher']['steps']}": metrics["teacher"]}
        for steps, row in sorted(table.items(), key=lambda item: int(item[0])):
            cells = [catalogue.written(k, row[k]) for k in ("evaluations", *keys)]
            cells[1] += f" ± {catalogue.written('fd', row['spread']['fd'])}"
            rows += f"| {steps} | " + " | ".join(cells) + " |\n"
        f = metrics["floor"]
        rows = (
            f"\nQuality by the `{recipe.eval.protocol}` protocol "
            f"({metrics['teacher']['n']} samples, {metrics['teacher']['seeds']} seeds, "
            f"{recipe.eval.teacher_solver} solver):\n\n"
            f"| steps | evaluations | {' | '.join(map(catalogue.label, keys))} |\n"
            "|---|---|---|---|---|---|---|\n" + rows + f"\nFloor, real data half against half "
            f"(twice the sampling error, being half the samples): distance {f['fd']:.3f}, "
            f"precision {f['precision']:.3f}, recall {f['recall']:.3f}, "
            f"coverage {f['coverage']:.3f}.\n"
        )
    return f"""---
library_name: diffusers
license: apache-2.0
---
# A small class-conditional diffusion model

Trained from scratch on `{recipe.data.source}` by `distill teach`, in
{summary["wall_s"] / 60:.0f} minutes on {summary["device"]}:
{summary["steps"]} steps of {recipe.train.batch} samples.
{rows}"""


def teach_pictures(recipe: TextRecipe, out: Path, resume: bool, where: str) -> dict[str, Any]:
    """Train the text-to-image teacher of a checked recipe, and save it in `out`/teacher.

    Raises:
        UserError: the configuration of a part has a wrong key or value.
    """
    run_folder.check_folder(recipe, out, resume)  # pyright: ignore[reportArgumentType]
    scenes = Scenes(shapes.all_captions(), shapes.draw, shapes.accuracy)
    pipe = text_to_image.pipeline(recipe, scenes.captions, where)
    run_folder.hold(out)
    write(out / "recipe.yaml", yaml.safe_dump(recipe.tree(), sort_keys=False))
    stages = text_to_image.train(pipe, recipe, scenes, out)
    threads = torch.get_num_threads()
    cpu = f"cpu ({platform.machine()}, {many(threads, 'thread')})"
    summary = {
        "stages": stages,
        "seed": recipe.train.seed,
        "device": cpu if device().type == "cpu" else device_name(device()),
        "wall_s": sum(stage["seconds"] for stage in stages.values()),
        "metrics": measure_pictures(recipe, out / "teacher"),
        "recipe": recipe.tree(),
    }
    text = json.dumps(summary, indent=2) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    (out / "teacher" / "measurements.json").write_text(text, encoding="utf-8")
    (out / "teacher" / "README.md").write_text(pictures_card(summary, recipe), encoding="utf-8")
    release(out)
    return summary


def measure_pictures(recipe: TextRecipe, folder: Path) -> dict[str, Any]:
    """Results of the pipeline in `folder`: each guidance at the most steps, the best at each count.

    The best guidance is the one whose pictures show their whole caption most often.
    """
    cfg = recipe.eval
    if cfg.protocol is None:
        return {}
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.to(device())
    measure = protocol(cfg.protocol)

    def results_of(steps: int, guidance: float) -> dict[str, Any]:
        def draw(prompts: list[str], seed: int) -> Samples:
            began = time.perf_counter()
            images = text_to_image.samples(pipe, prompts, seed, steps, guidance)
            return images_to_samples(images, prompts, time.perf_counter() - began)

        evaluations = steps * (1 if guidance == 1 else 2)
        results = measure(draw, cfg.seeds)
        return {**results, "steps": steps, "guidance": guidance, "evaluations": evaluations}

    most = max(cfg.steps)
    by_guidance = {f"{g:g}": results_of(most, g) for g in cfg.guidance}
    best = max(by_guidance.values(), key=lambda row: row["accuracy"])
    few = {str(k): results_of(k, best["guidance"]) for k in sorted(cfg.steps) if k != most}
    return {
        "teacher": best,
        "teacher_few": few,
        "guidance": by_guidance,
        "floor": floor(cfg.protocol),
    }


def pictures_card(summary: dict[str, Any], recipe: TextRecipe) -> str:
    """The README of a text-to-image teacher: data, parts, cost, quality."""
    vae, unet = summary["stages"]["vae"], summary["stages"]["unet"]
    held_out, cfg = vae["held_out"], recipe.train
    prompt, side = shapes.all_captions()[0], recipe.unet["sample_size"]
    latents = f"AutoencoderKL, {recipe.vae['latent_channels']}×{side}×{side} latents"
    rows = "\n".join(
        f"| {name} | {stage['parameters']:,} | {stage['steps']} steps of {batch} "
        f"| {stage['seconds'] / 60:.1f} min | {stage['steps_per_s']:.2f} |"
        for name, stage, batch in (
            (latents, vae, cfg.vae.batch),
            ("UNet2DConditionModel, CLIPTextModel", unet, cfg.unet.batch),
        )
    )
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---
# A small text-to-image diffusion model of captioned shapes

An ordinary `StableDiffusionPipeline` of 32×32 pictures, trained from scratch by `distill teach` in
{summary["wall_s"] / 60:.0f} minutes on {summary["device"]}.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("teachers/shapes")
image = pipe("{prompt}", num_inference_steps=25, guidance_scale=3).images[0]
```

## Data

{len(shapes.all_captions())} captions of one grammar, "one | two | three", a colour, a shape and a
place, with {recipe.data.each} pictures of each, drawn by `eval/shapes`. Sizes, places and shades
vary within the limits of the caption. There are no other data.

- colours: {", ".join(shapes.COLOURS)}
- shapes: {", ".join(shapes.SHAPES)}
- places: {", ".join(shapes.POSITIONS)}

## Parts

| part | parameters | trained for | wall time | steps/s |
|---|---|---|---|---|
{rows}

The prediction type is {recipe.scheduler.get("prediction_type", "epsilon")}, the schedule Stable
Diffusion's. {cfg.unet.drop:.0%} of the captions were replaced by the empty prompt, which is
therefore unconditional. Of the pictures that the autoencoder was not trained on,
{held_out["accuracy"]:.2%} still show their whole caption after it ({held_out["psnr_db"]:.1f} dB).
{pictures_tables(summary["metrics"], recipe)}"""


COLUMNS = ("fd", "accuracy", "shape_accuracy", "colour_accuracy", "count_accuracy",
           "position_accuracy", "precision", "recall", "coverage")  # fmt: skip


def pictures_tables(metrics: dict[str, Any], recipe: TextRecipe) -> str:
    """Tables of quality by guidance and by steps, with the floor; empty without a protocol."""
    if not metrics:
        return ""

    def line(name: str, row: dict[str, Any]) -> str:
        return f"| {name} | " + " | ".join(f"{row[k]:.3f}" for k in COLUMNS) + " |\n"

    head = " | ".join(map(catalogue.label, COLUMNS)) + " |\n|---" + "|---" * len(COLUMNS) + "|\n"
    best = metrics["teacher"]
    by_guidance = "".join(line(g, row) for g, row in metrics["guidance"].items())
    few = {**metrics["teacher_few"], str(best["steps"]): best}
    by_steps = "".join(line(k, row) for k, row in few.items())
    return f"""
## Quality

By the `{best["protocol"]}` protocol: {best["n"]} pictures a seed, seeds: {best["seeds"]}.
An exact program reads the accuracies from the pixels.
The scheduler is {recipe.scheduler["class"]}; guidance 1
means no guidance. The floor compares new drawings with the same reference.

At {best["steps"]} steps, by guidance:

| guidance | {head}{by_guidance}
At guidance {best["guidance"]:g}, by steps:

| steps | {head}{by_steps}{line("floor", metrics["floor"])}"""
