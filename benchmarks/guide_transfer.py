"""What a guide keeps of its effect beside another teacher than it was trained with.

    python benchmarks/guide_transfer.py runs/guide/guided [OVERRIDE ...]

Overrides are of the recipe shapes/guide, such as a LoRA that tunes its teacher:
`teacher.adapters=[{file: recipes/shapes/orange/style.safetensors, strength: 0.85}]`. Prints the
figures of the teacher's one evaluation, of the same with the guide, and of the guided two; and two
shares: of the gain in right captions, and of the guided x̂'s distance from the unguided one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from distill.config.recipe import Recipe
from distill.console import out, print_line, results_table
from distill.data.from_recipe import source_of
from distill.objectives.losses import mean_square
from distill.objectives.smaller.guide import Beside
from distill.pretrain.guide import measure
from distill.sampling.guided_teacher import guided, load_teacher
from eval.protocols.measure import protocol
from students.lora import network_of
from teachers.teacher import Teacher

SAMPLES = 256


@torch.no_grad()
def share(recipe: Recipe, teacher: Teacher, controlnet: Any) -> float:
    """1 - |x̂_guide - x̂_g|² / |x̂ - x̂_g|², in the units of the network's loss."""
    network: Any = network_of(teacher.denoiser)
    both = network.twin(Beside(network, controlnet), network.schedule)
    of = guided(recipe.teacher, teacher)
    left = whole = 0.0
    source = source_of(recipe, teacher)
    for draw in range(SAMPLES // 32):
        batch = source.batch(draw, 0, 1, 32)
        t = torch.rand(32, generator=torch.Generator().manual_seed(draw))
        x_t = network.process.noise(batch.data, t, batch.noise)
        target, weight = of(x_t, t, batch.cond), network.weight(t)
        left += (weight * mean_square(both(x_t, t, batch.cond), target)).sum().item()
        whole += (weight * mean_square(network(x_t, t, batch.cond), target)).sum().item()
    return 1 - left / whole


def main(folder: Path, overrides: list[str]) -> None:
    from diffusers import ControlNetModel

    recipe = Recipe.load("shapes/guide", overrides)
    teacher = load_teacher(recipe.teacher)
    controlnet: Any = ControlNetModel.from_pretrained(folder / "controlnet")
    controlnet.eval()
    print_line(f"share of the guided output's distance: {share(recipe, teacher, controlnet):.3f}")
    if not (rows := measure(recipe, teacher, controlnet, protocol("shapes"))):
        return
    out.print(results_table("teacher", rows, base="teacher"))
    base, two = (rows[name]["accuracy"] for name in ("base", "teacher"))
    kept = (rows["guide"]["accuracy"] - base) / (two - base)
    print_line(f"share of the gain in right captions: {kept:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
