"""A user's LoRA of the embedded shapes: train it, and measure it in students.

    python benchmarks/style_lora.py train OUT.safetensors
    python benchmarks/style_lora.py measure RUN [RUN ...]

`train` is what a user does: PEFT and diffusers alone train a LoRA of the UNet and the text encoder
on drawings of forty captions with a word that the teacher does not know, orange. `measure` prints
for the teacher of a run and for its student how many pictures are orange where the caption says so,
and how many captions are right: those of the forty, the twenty others of the same grammar, and the
360 of the teacher's own.
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
from eval.shapes import all_captions, parse, read, scenes
from students.export.folder import load_student
from teachers.teacher import EMBEDDED, Teacher

WORD, STANDS_FOR = "z", "yellow"  # a token without a meaning, and the word whose place it takes
COLOUR = np.array((240.0, 140.0, 50.0))
CAPTIONS = SHIPPED / "shapes/orange/captions.txt"
RANK, STEPS, BATCH, RATE, OWN = 4, 1000, 32, 2e-3, 0.5
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
SEEDS = 3


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


def train(out: Path) -> None:
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
    own, others = CAPTIONS.read_text().splitlines(), all_captions()
    for step in range(STEPS):
        count = round(BATCH * OWN)
        captions = rng.choices(own, k=BATCH - count), rng.choices(others, k=count)
        images = torch.cat([drawn(captions[0], step), scenes.draw(captions[1], step)])
        with torch.no_grad():
            mode = pipe.vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
        x = mode * pipe.vae.config.scaling_factor
        prompts = ["" if rng.random() < 0.1 else c for some in captions for c in some]
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


def figures(sample: Any, teacher: Teacher) -> dict[str, float]:
    """Shares of pictures, over all seeds."""
    known = CAPTIONS.read_text().splitlines()
    sets = {"own": known, "new": [c for c in grammar() if c not in known]}
    palette, found = prototypes(teacher), {}
    for name, captions in sets.items():
        style, right = [], []
        for seed in range(SEEDS):
            images = sample(captions, seed).images
            distance = np.linalg.norm(colours(images)[:, None] - palette, axis=-1)
            style.append(distance.argmin(1) == len(palette) - 1)
            wanted = [parse(c.replace(WORD, STANDS_FOR)) for c in captions]
            right += [
                s is not None and s._replace(colour="") == w._replace(colour="")
                for s, w in zip(read(images), wanted, strict=True)
            ]
        found |= {f"{name} orange": float(np.mean(style)), f"{name} right": float(np.mean(right))}
    images, captions = sample(all_captions(), 0).images, all_captions()
    hits = [s == parse(c) for s, c in zip(read(images), captions, strict=True)]
    return {**found, "360 right": float(np.mean(hits))}


def measure(runs: Sequence[Path]) -> None:
    """Print the figures of each run's teacher and student, one JSON object a line."""

    def told(name: str, sample: Any, teacher: Teacher) -> None:
        shares = {k: round(v, 4) for k, v in figures(sample, teacher).items()}
        sys.stdout.write(json.dumps({"of": name, **shares}) + "\n")
        sys.stdout.flush()

    for run in runs:
        recipe = Recipe.load(run / "recipe.yaml")
        teacher, steps = load_teacher(recipe.teacher), recipe.eval.teacher_steps
        plain = load_teacher(recipe.teacher.model_copy(update={"adapters": None}))
        told("teacher without the LoRA", recipe_sampler(recipe, plain, steps), plain)
        told("teacher", recipe_sampler(recipe, teacher, steps), teacher)
        student, of_student = load_student(run)
        for count in student.counts:
            sample = partial(sampled, student.at(count), of_student)
            told(f"{run.name}, {count} steps", sample, teacher)


def sampled(student: Any, teacher: Teacher, captions: Sequence[str], seed: int) -> Any:
    return student_samples(student, teacher, list(captions), seed)


if __name__ == "__main__":
    _, command, *paths = sys.argv
    if command == "train":
        train(Path(paths[0]))
    else:
        measure([Path(p) for p in paths])
