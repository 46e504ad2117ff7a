"""Frozen networks in bf16 run without autocast, and lose no more than autocast does."""

import pytest
import torch

from teachers import load
from tests.helpers import families


def prediction(teacher, cond):
    torch.manual_seed(0)
    x = torch.randn(4, *teacher.shape)
    with torch.no_grad():
        return teacher.denoiser(x, torch.linspace(0.1, 0.9, 4), cond)


def error(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


# FLUX.2's network rounds the time that it is given to its weights' precision, before its layers
ROUNDED = {"flux2-dev", "flux2-klein"}
NAMES = [*families.FAMILIES, *(name for name in families.RECENT if name not in ROUNDED)]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_bf16_is_as_near_as_under_autocast(folders, name):
    options = families.OPTIONS.get(name, {})
    teacher = load(folders(name), **options)
    prompts = list(range(4)) if teacher.codec.classes else ["a", "b c", "d", "e"]
    cond = teacher.codec.condition(prompts)
    exact = prediction(teacher, cond)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = error(prediction(teacher, cond), exact)
    half = load(folders(name), **options, precision="bf16")
    native = prediction(half, cond)
    assert native.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prediction(half, cond), native)  # whatever autocast is around it
    assert error(native, exact) <= 2 * autocast + 0.002
