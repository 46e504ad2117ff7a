"""`distill teach`: train a small teacher from nothing, as an ordinary diffusers folder.

A teacher recipe is a recipe without a teacher: in its place it has `network`, the configuration of
a UNet2DModel, and `scheduler`, that of the diffusers scheduler that says how it is read.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

from distill import build
from distill.recipe import Recipe, find, override, read_yaml
from distill.seeds import seed_all
from eval.protocol import floor
from teachers.errors import UserError, nearest
from teachers.schedule import read as read_schedule
from teachers.teacher import load, read_json
from teachers.unet import UNet

STEPS = (1, 2, 4, 8, 32)  # at which the card gives the teacher's quality


def teach(path: str, out: Path, overrides: list[str], resume: bool) -> dict[str, Any]:
    """Train the teacher that the recipe describes; it is left in `out`/teacher.

    Raises:
        UserError: as for any recipe, and for unknown keys of the network or the scheduler.
    """
    tree = override(read_yaml(find(path)), overrides)
    for section in ("network", "scheduler"):
        if not isinstance(tree.get(section), dict):
            raise UserError(f"{path}: {section}: missing; a teacher recipe describes its {section}")
    network, scheduler = tree.pop("network"), tree.pop("scheduler")
    objective = tree.get("objective")
    null_label = objective.get("null_label") if isinstance(objective, dict) else None
    first = out / ".untrained"
    tree["teacher"] = {"source": str(first), "null_label": null_label}
    recipe = Recipe.check(tree, path)
    if recipe.kind.few_step:
        raise UserError(f"{path}: objective.name: teachers are taught by 'diffusion'")
    pipe = pipeline(network, scheduler, recipe.train.seed, path)
    classes = pipe.unet.config.num_class_embeds or 0
    if recipe.objective["drop"] and not recipe.objective["null_label"] < classes:
        raise UserError(f"{path}: objective.null_label: the network has {classes} classes")
    build.check_folder(recipe, out, resume)
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
        shutil.rmtree(out / "teacher", ignore_errors=True)
        os.replace(draft, out / "teacher")
        run.teacher = load(str(out / "teacher"), null_label=null_label)
        summary = build.summarise(run, measure(run))
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        (out / "teacher" / "README.md").write_text(card(summary, recipe))
    run.engine.accelerator.wait_for_everyone()
    run.engine.accelerator.end_training()
    return summary


def keep(pipe: Any, folder: Path, where: str) -> None:
    """Leave the untrained pipeline in `folder`, or check that the one there is the same."""
    if folder.exists():
        for part, config in (("unet", pipe.unet.config), ("scheduler", pipe.scheduler.config)):
            name = "config.json" if part == "unet" else "scheduler_config.json"
            before = read_json(folder / part / name, where)
            now = json.loads(json.dumps(dict(config), default=list))
            wrong = [k for k, v in now.items() if not k.startswith("_") and before.get(k) != v]
            if wrong:
                section = "network" if part == "unet" else part
                raise UserError(
                    f"{where}: {section}.{wrong[0]} differs from the run in {folder.parent}"
                )
        return
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")  # each process its own
    pipe.save_pretrained(draft)
    try:
        os.replace(draft, folder)
    except OSError:  # another process was first
        shutil.rmtree(draft, ignore_errors=True)


def pipeline(network: dict[str, Any], scheduler: dict[str, Any], seed: int, where: str) -> Any:
    """An untrained pipeline of the two configurations."""
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
    except Exception as error:  # of whatever kind a wrong size comes to
        raise UserError(f"{where}: network: {error}") from None
    try:
        read = kind(**config)
        UNet(unet, read_schedule(kind.__name__, dict(read.config), f"{where}: scheduler"))
        return diffusers.ConsistencyModelPipeline(unet=unet, scheduler=read)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: scheduler: {error}") from None


def measure(run: build.Run) -> dict[str, Any]:
    """The teacher by solver steps, and the floor that real data give."""
    if run.protocol is None:
        return {}
    seeds = run.recipe.eval.teacher_seeds
    few = {str(k): build.evaluate_teacher(run, k, seeds) for k in STEPS}
    whole = build.evaluate_teacher(run, run.recipe.eval.teacher_steps, seeds)
    return {"teacher": whole, "teacher_few": few, "floor": floor(run.protocol.name)}


def card(summary: dict[str, Any], recipe: Recipe) -> str:
    """The README of a taught teacher: data, cost, and what it can do."""
    metrics = summary["metrics"]
    rows = ""
    if metrics:
        table = {**metrics["teacher_few"], f"{metrics['teacher']['steps']}": metrics["teacher"]}
        for steps, row in sorted(table.items(), key=lambda item: int(item[0])):
            rows += (
                f"| {steps} | {row['evaluations']} | {row['fd']:.3f} ± {row['spread']['fd']:.3f} | "
                f"{row['precision']:.3f} | {row['recall']:.3f} | {row['coverage']:.3f} | "
                f"{row['accuracy']:.3f} |\n"
            )
        f = metrics["floor"]
        rows = (
            f"\nQuality by the `{recipe.eval.protocol}` protocol "
            f"({metrics['teacher']['n']} samples, {metrics['teacher']['seeds']} seeds, "
            f"{recipe.eval.teacher_solver} solver):\n\n"
            "| steps | evaluations | Fréchet distance | precision | recall | coverage "
            "| label accuracy |\n"
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

Trained from nothing on `{recipe.data.source}` by `distill teach`, in
{summary["wall_s"] / 60:.0f} minutes on {summary["device"]}:
{summary["steps"]} steps of {recipe.train.batch} samples.
{rows}"""
