"""The recipe of LCM-LoRA on the shapes: stock diffusers samples it by its own scheduler."""

import pytest
import torch

from distill.config.recipe import Recipe
from distill.evaluation import finish
from distill.training import build
from eval import shapes
from teachers.teacher import EMBEDDED

CAPTIONS = shapes.all_captions()[::3]


def right(lora, steps):
    """The share of captions that are right in stock diffusers with a LoRA and LCMScheduler."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(EMBEDDED["shapes"])
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        CAPTIONS, num_inference_steps=steps, guidance_scale=1.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found = shapes.read((out.images * 255).round().to(torch.uint8).cpu())
    return sum(a == shapes.parse(b) for a, b in zip(found, CAPTIONS, strict=True)) / len(CAPTIONS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stock_diffusers_samples_the_lcm_lora_at_two_and_four_steps(tmp_path):
    """Trained by its recipe (160 steps): most captions are right at 2 steps, nearly all at 4."""
    recipe = Recipe.load("shapes/lcm-lora", ["eval.protocol=null", "train.sample_every=0"])
    run = build.build(recipe, tmp_path / "run")
    run.engine.train()
    finish.finish(run)
    lora = tmp_path / "run/lora/pytorch_lora_weights.safetensors"
    assert right(lora, 2) > 0.93
    assert right(lora, 4) > 0.96
