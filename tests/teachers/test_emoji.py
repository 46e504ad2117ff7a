"""The shipped emoji teacher: a Stable Diffusion of 64 pixels that stock diffusers draws with."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from teachers.catalogue.loading import load

FOLDER = Path(__file__).parents[2] / "teachers" / "emoji"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def hearts(pipe):
    """Pictures (4, 3, 64, 64) in [0, 1] of red hearts."""
    images = pipe(
        ["3d style, red heart"] * 4, num_inference_steps=8, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return images.images


def test_it_loads_in_float32_and_draws_a_red_heart_on_white(pipe, hearts):
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert hearts[:, :, :3].mean() > 0.97  # the margin is white
    centre = hearts[:, :, 24:36, 24:40].mean((2, 3))
    assert (centre[:, 0] > 0.85).all()
    assert (centre[:, 1:] < 0.45).all()


def test_its_captions_change_what_it_draws(pipe, hearts):
    images = pipe(
        ["line style, red heart", "3d style, four leaf clover"], num_inference_steps=8,
        guidance_scale=3.0, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    line, clover = images
    assert (line.amax(0) - line.amin(0)).mean() < 0.05  # no colour
    assert (clover[1] - clover[0]).clamp(min=0).sum() > 100  # green


def test_it_is_a_teacher_whose_denoiser_removes_noise(hearts):
    teacher = load(str(FOLDER))
    assert teacher.shape == (8, 16, 16)
    x = teacher.codec.encode(2 * hearts - 1)
    t = torch.full((4,), 0.3)
    rng = torch.Generator().manual_seed(1)
    x_t = teacher.denoiser.process.noise(x, t, torch.randn(x.shape, generator=rng))
    with torch.no_grad():
        xhat = teacher.denoiser(x_t, t, teacher.codec.condition(["3d style, red heart"] * 4))
    assert (xhat - x).square().mean() < 0.5 * (x_t - x).square().mean()
