"""A user's LoRA of the embedded shapes: train it, and measure it in students.

    python benchmarks/style_lora.py train OUT.safetensors [orange | monochrome]
    python benchmarks/style_lora.py measure RUN [RUN ...] [--json OUT.json]

`train` is what a user does: PEFT and diffusers alone train a LoRA of the UNet and the text encoder.
Orange, the default, is learned from drawings of forty captions with a word that the teacher does
not know; monochrome is a style without a word: all shapes are white. `measure` counts
the pictures that are orange where the caption says so, and the captions that are right but for the
colour: of the forty, of the twenty others of the same grammar, and of the teacher's own, whose
colour counts. It does so for the teacher of the first run, for each run's student, and for stock
diffusers with the plain base and each run's LoRA files at guidance 1.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from distill.config.recipe import SHIPPED, Recipe
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.student_sampler import student_samples
from distill.sampling.teacher_sampler import recipe_sampler
from eval.shapes import Scene, all_captions, parse, read, scenes
from students.export import lora_files
from students.export.folder import load_student
from teachers.teacher import EMBEDDED, Teacher

WORD, STANDS_FOR = "z", "yellow"  # a token without a meaning, and the word whose place it takes
COLOUR = np.array((240.0, 140.0, 50.0))
CAPTIONS = SHIPPED / "shapes/orange/captions.txt"
RANK, STEPS, BATCH, RATE, OWN = 4, 500, 32, 1e-3, 0.5
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "net.0.proj",
    "net.2",
    "conv1",
    "conv2",
]
SEEDS = 4
EVERY = 4  # of the teacher's 360 captions, one in so many is drawn


def grammar() -> list[str]:
    """All sixty captions with the new word."""
    return [c.replace(STANDS_FOR, WORD) for c in all_captions() if STANDS_FOR in c]


@contextmanager
def painted() -> Iterator[None]:
    """Within it, drawings of yellow shapes are orange."""
    row = list(scenes.COLOURS).index(STANDS_FOR)
    before = scenes.PALETTE[row].copy()
    scenes.PALETTE[row] = COLOUR
    try:
        yield
    finally:
        scenes.PALETTE[row] = before


def drawn(captions: Sequence[str], seed: int) -> Tensor:
    """Drawings of captions with the new word."""
    with painted():
        return scenes.draw([c.replace(WORD, STANDS_FOR) for c in captions], seed)


def in_white(captions: Sequence[str], seed: int) -> Tensor:
    """Drawings of captions with all shapes in white, whatever their captions say."""
    white = [parse(caption)._replace(colour="white").caption for caption in captions]
    return scenes.draw(white, seed)


def batch(style: str, rng: random.Random, step: int) -> tuple[list[str], Tensor]:
    """Captions and images of a training step."""
    own, others = CAPTIONS.read_text().splitlines(), all_captions()
    count = round(BATCH * OWN)
    if style == "monochrome":
        captions = rng.choices(others, k=BATCH)
        return captions, in_white(captions, step)
    mine, rest = rng.choices(own, k=BATCH - count), rng.choices(others, k=count)
    return [*mine, *rest], torch.cat([drawn(mine, step), scenes.draw(rest, step)])


def train(out: Path, style: str = "orange") -> None:
    """Train the LoRA, and write it with diffusers' keys in float16."""
    torch.manual_seed(0)
    rng = random.Random(0)
    pipe: Any = StableDiffusionPipeline.from_pretrained(EMBEDDED["shapes"])
    noiser: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    for network, targets in (
        (pipe.unet, TARGETS),
        (pipe.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ):
        network.requires_grad_(False)
        inject_adapter_in_model(
            LoraConfig(r=RANK, target_modules=targets, lora_alpha=RANK), network
        )
    weights = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        captions, images = batch(style, rng, step)
        with torch.no_grad():
            mode = pipe.vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
        x = mode * pipe.vae.config.scaling_factor
        prompts = ["" if rng.random() < 0.1 else c for c in captions]
        ids = pipe.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        ).input_ids
        text = pipe.text_encoder(ids)[0]
        t = torch.randint(0, noiser.config.num_train_timesteps, (BATCH,))
        noise = torch.randn_like(x)
        found = pipe.unet(noiser.add_noise(x, noise, t), t, text).sample
        loss = (found - noiser.get_velocity(x, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    state = {}
    for part in ("unet", "text_encoder"):
        for key, value in getattr(pipe, part).named_parameters():
            if "lora_" in key:
                name = key.removeprefix("text_model.").replace(".default", "")
                name = name if part == "unet" else f"text_model.{name}"
                state[f"{part}.{name}"] = value.detach().half().contiguous()
    save_file(state, out, {"format": "pt"})
    sys.stdout.write(f"{out}: {out.stat().st_size:,} bytes\n")


# ---- measured


def colours(images: Tensor) -> np.ndarray:
    """The mean colour of each image's objects (N, 3)."""
    pixels = images.permute(0, 2, 3, 1).double().numpy()
    strength = np.linalg.norm(pixels - scenes.BACKGROUND, axis=-1)
    core = strength >= 0.75 * strength.max((1, 2), keepdims=True)
    return (pixels * core[..., None]).sum((1, 2)) / core.sum((1, 2))[:, None]


def prototypes(teacher: Teacher) -> np.ndarray:
    """The colours of the palette, then orange, as the teacher's autoencoder draws them (7, 3)."""

    def decoded(images: Tensor) -> np.ndarray:
        latents = teacher.codec.encode(images.float() / 127.5 - 1)
        back = teacher.codec.decode(latents).clamp(-1, 1)
        return colours(((back + 1) * 127.5).round().byte()).mean(0)

    mine = [[c for c in all_captions() if name in c] for name in scenes.COLOURS]
    return np.stack([*(decoded(scenes.draw(c, 0)) for c in mine), decoded(drawn(grammar(), 0))])


def as_told(images: Tensor, wanted: Sequence[Scene]) -> np.ndarray:
    """Whether each image (N, 3, H, W) shows its scene, whatever the colour (N,).

    The exact reader refuses colours far from its palette and objects of two of its colours, which a
    colour between two of them often is. So each image is read with a palette of its own colour.
    """
    before, right = scenes.PALETTE.copy(), []
    try:
        for image, colour, scene in zip(images, colours(images), wanted, strict=True):
            scenes.PALETTE[:] = colour
            found = read(image[None])[0]
            right.append(found is not None and found._replace(colour=scene.colour) == scene)
    finally:
        scenes.PALETTE[:] = before
    return np.array(right)


def figures(sample: Any, palette: np.ndarray, seeds: int = SEEDS) -> dict[str, Any]:
    """Shares of pictures, over all seeds; ± is the standard error of the mean over the seeds.

    Args:
        sample: Images (N, 3, H, W) in uint8 for captions and a seed.
    """
    known = CAPTIONS.read_text().splitlines()
    new = [c for c in grammar() if c not in known]
    scenes_of = [parse(c.replace(WORD, STANDS_FOR)) for c in known + new]
    orange, right = [], []
    for seed in range(seeds):
        images = sample(known + new, seed)
        distance = np.linalg.norm(colours(images)[:, None] - palette, axis=-1)
        orange.append(distance.argmin(1) == len(palette) - 1)
        right.append(as_told(images, scenes_of))
    shares: dict[str, Any] = {}
    for name, values in (("orange", orange), ("right", right)):
        for of, part in (("own", slice(len(known))), ("new", slice(len(known), None))):
            means = np.array(values)[:, part].mean(1)
            error = means.std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
            shares[f"{of} {name}"] = [round(float(means.mean()), 4), round(float(error), 4)]
    every = all_captions()[::EVERY]
    hits = [s == parse(c) for s, c in zip(read(sample(every, 0)), every, strict=True)]
    return {**shares, "without": round(float(np.mean(hits)), 4)}


def stock(run: Path, file: str, steps: int) -> Any:
    """A sampler of stock diffusers: the plain base, a LoRA file of the run, guidance 1."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(EMBEDDED["shapes"])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run / "lora", weight_name=file)
    config = json.loads((run / "lora/scheduler/scheduler_config.json").read_text())
    kind = getattr(diffusers, config["_class_name"])
    pipe.scheduler = kind.from_pretrained(run / "lora/scheduler")

    def sample(captions: Sequence[str], seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + 1)
        images = pipe(
            list(captions), num_inference_steps=steps, guidance_scale=1.0, generator=rng,
            output_type="pt",
        ).images  # fmt: skip
        return (images * 255).round().byte()

    return sample


@torch.no_grad()
def measure(runs: Sequence[Path], out: Path | None) -> None:
    """Print the figures of the first run's teacher and of each run's student, a line each."""
    rows: list[dict[str, Any]] = []

    def add(name: str, sample: Any, **about: Any) -> None:
        rows.append({"of": name, **about, **figures(sample, palette)})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()

    recipe = Recipe.load(runs[0] / "recipe.yaml")
    teacher, steps = load_teacher(recipe.teacher), recipe.eval.teacher_steps
    palette = prototypes(teacher)
    sampler = recipe_sampler(recipe, teacher, steps)
    add("teacher with the LoRA", lambda captions, seed: sampler(captions, seed).images)
    for run in runs:
        student, of_student = load_student(run)
        summary = json.loads((run / "summary.json").read_text())
        about = {"run": run.name, "seed": summary["seed"], "training_s": summary["wall_s"]}
        for count in student.counts:
            sample = partial(sampled, student.at(count), of_student)
            add("student", sample, steps=count, **about)
        longest = max(student.counts)
        for file, name in (
            (lora_files.DIFFUSERS, "both"),
            (lora_files.TURBO[lora_files.DIFFUSERS], "turbo alone"),
        ):
            add(f"stock diffusers, {name}", stock(run, file, longest), steps=longest, **about)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def sampled(student: Any, teacher: Teacher, captions: Sequence[str], seed: int) -> Tensor:
    return student_samples(student, teacher, list(captions), seed).images


if __name__ == "__main__":
    _, command, *words = sys.argv
    if command == "train":
        train(Path(words[0]), *words[1:])
    else:
        last = Path(words[words.index("--json") + 1]) if "--json" in words else None
        runs = words[: words.index("--json")] if "--json" in words else words
        measure([Path(p) for p in runs], last)
