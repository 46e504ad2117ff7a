"""What a guide keeps of its effect beside another teacher than it was trained with.

    python benchmarks/guide_transfer.py runs/guide/guided OVERRIDE [OVERRIDE ...]

The first override of the recipe shapes/guide makes the other teacher, such as a LoRA that tunes it:
`teacher.adapters=[{file: recipes/shapes/orange/style.safetensors, strength: 0.85}]`; the rest are
of both. Prints two shares of each: of the distance from the unguided to the guided x̂, and of the
gain in right captions, with the figures of one evaluation without the guide, of one with it, and
of the guided two (eval.teacher_seeds=0 leaves these out).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from distill.config.recipe import Recipe
from distill.console import out, print_line, results_table
from distill.objectives.losses import mean_square
from distill.objectives.smaller.guide import Beside
from distill.pretrain.guide import measure
from distill.sampling.guided_teacher import guided, load_teacher
from eval import shapes
from eval.protocols.measure import protocol
from students.lora import network_of
from teachers.teacher import Teacher

SAMPLES = 256


@torch.no_grad()
def share(recipe: Recipe, teacher: Teacher, controlnet: Any) -> float:
    """1 - |x̂_guide - x̂_g|² / |x̂ - x̂_g|², in the units of the network's loss, at even times."""
    network: Any = network_of(teacher.denoiser)
    both = network.twin(Beside(network, controlnet), network.schedule)
    of = guided(recipe.teacher, teacher)
    captions, rng = shapes.captions(SAMPLES, seed=0), torch.Generator().manual_seed(0)
    data = teacher.codec.encode(shapes.draw(captions, seed=1).float() / 127.5 - 1)
    noise, times = torch.randn(data.shape, generator=rng), torch.rand(SAMPLES, generator=rng)
    left = whole = 0.0
    for i in range(0, SAMPLES, 32):
        part = slice(i, i + 32)
        t, cond = times[part], teacher.codec.condition(captions[part])
        x_t = network.process.noise(data[part], t, noise[part])
        target, weight = of(x_t, t, cond), network.weight(t)
        left += (weight * mean_square(both(x_t, t, cond), target)).sum().item()
        whole += (weight * mean_square(network(x_t, t, cond), target)).sum().item()
    return 1 - left / whole


def main(folder: Path, overrides: list[str]) -> None:
    from diffusers import ControlNetModel

    controlnet: Any = ControlNetModel.from_pretrained(folder / "controlnet")
    controlnet.eval()
    for name, given in (("its own teacher", overrides[1:]), ("the other teacher", overrides)):
        recipe = Recipe.load("shapes/guide", given)
        teacher = load_teacher(recipe.teacher)
        found = share(recipe, teacher, controlnet)
        print_line(f"{name}: share of the guided output's distance: {found:.3f}")
        if not (rows := measure(recipe, teacher, controlnet, protocol("shapes"))):
            continue
        out.print(results_table("teacher", rows, base="teacher"))
        base, two = (rows[k]["accuracy"] for k in ("base", "teacher"))
        kept = (rows["guide"]["accuracy"] - base) / (two - base)
        print_line(f"{name}: share of the gain in right captions: {kept:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
