"""Convolutions in the place of self-attention: ΔConvFusion's block and what it begins as."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention

from distill.objectives.base import Batch
from distill.objectives.smaller.compress import Compression
from students.architecture.change import changed
from students.export import folder as folders
from students.generator import Generator
from students.lora import network_of
from students.schedulers import source_of
from students.schedulers import student as student_of
from teachers import load
from teachers.errors import UserError
from teachers.features import tapped
from teachers.reduced.pyramid import Pyramid, gated, pooled, pyramid, upsampled

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = f"{BLOCK}.attn1"


def attention(**settings):
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, **settings)


def drawn(channels=16, stages=2):
    """A pyramid none of whose weights is zero."""
    torch.manual_seed(1)
    made = Pyramid(channels, stages)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def test_mean_then_convolution_is_convolution_then_mean():
    made, x = drawn(), torch.randn(2, 16, 8, 8)
    first = made.mean(x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(first, made.mean(x).mean((2, 3), keepdim=True))


@pytest.mark.parametrize(
    "settings", [{}, {"bias": True}, {"out_bias": False}, {"rescale_output_factor": 2.0}]
)
def test_it_begins_as_the_attention_whose_map_is_uniform(settings):
    """Without queries and keys each token attends to all alike; then the mean's branch is exact."""
    layer = attention(**settings)
    made = pyramid(deepcopy(layer))
    x = torch.randn(3, 64, 16)
    for linear in (layer.to_q, layer.to_k):
        for p in linear.parameters():
            torch.nn.init.zeros_(p)
    with torch.no_grad():
        torch.testing.assert_close(made(x), layer(x))
        sharp = attention(**settings)
        sharp.to_q.weight *= 9
        assert (made(x) - sharp(x)).abs().max() > 1e-3


def test_a_linear_fit_of_a_uniform_attention_by_the_mean_leaves_nothing():
    layer = attention(bias=True)
    for p in (*layer.to_q.parameters(), *layer.to_k.parameters()):
        torch.nn.init.zeros_(p)
    x = torch.randn(200, 64, 16)
    with torch.no_grad():
        mean = torch.cat([x.mean(1), torch.ones(200, 1)], 1).double()
        out = layer(x).mean(1).double()
    residual = out - mean @ torch.linalg.lstsq(mean, out).solution
    assert residual.abs().max() < 1e-5


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_a_product_of_unit_deviation_has_that_of_one_over_the_root_of_its_channels(channels):
    torch.manual_seed(0)
    f = torch.randn(64, channels, 32, 32)
    assert gated(f).std().item() == pytest.approx(channels**-0.5, rel=0.02)
    assert torch.equal(gated(f)[:, 0], f[:, 0] * f[:, channels // 2] / channels**0.5)
    assert torch.allclose(gated(3 * f), 9 * gated(f))  # quadratic


def test_the_local_part_by_hand():
    """Sum over stages of up(gated(conv(pool(narrow)))), by loops over squares."""
    made, x = drawn(), torch.randn(2, 64, 16)
    picture = x.transpose(1, 2).reshape(2, 16, 8, 8)
    narrow = made.into(picture)
    total = 0
    for i, stage in enumerate(made.stages, 1):
        k = 2**i
        small = narrow.reshape(2, -1, 8 // k, k, 8 // k, k).mean((3, 5))
        f = stage(small)
        half = f.shape[1] // 2
        product = f[:, :half] * f[:, half:] / (2 * half) ** 0.5
        total = total + torch.nn.functional.interpolate(product, scale_factor=k, mode="bilinear")
    out = made.out(total) + made.mean(picture.mean((2, 3), keepdim=True))
    torch.testing.assert_close(made(x), out.flatten(2).transpose(1, 2))
    assert (
        made.into.out_channels == 16 // (2 * 2) == made.stages[0].groups == made.out.in_channels * 2
    )


def test_pictures_whose_side_is_no_multiple_are_pooled_to_their_edge():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert pooled(x, 2).tolist() == [[[[2.0, 3.5], [6.5, 8.0]]]]
    assert pooled(x, 8).tolist() == [[[[4.0]]]]
    assert upsampled(pooled(x, 8), 3).eq(4).all()
    assert drawn(stages=3)(torch.randn(1, 25, 16)).shape == (1, 25, 16)
    with pytest.raises(ValueError, match="6 tokens are none"):
        drawn()(torch.randn(1, 6, 16))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (f"{BLOCK}.attn2", {}, "self-attention"),
        (f"{BLOCK}.ff", {}, "self-attention"),
        (ATTENTION, {"stages": 0}, "stages: give 1 to 6"),
        (ATTENTION, {"stages": True}, "stages: give 1 to 6"),
        (ATTENTION, {"levels": 2}, "has stages"),
    ],
)
def test_what_cannot_be_a_pyramid_is_refused(name, settings, words):
    form = {name: {"kind": "pyramid", **settings}}
    with pytest.raises(UserError, match=words) as error:
        changed(load("shapes").denoiser.backbone, {}, {}, [], change=form)
    assert error.value.key == f"student.architecture.change.{name}"


def test_pictures_that_are_not_square_are_refused_before_any_work():
    backbone = load("shapes").denoiser.backbone
    with pytest.raises(UserError, match="8×16; keep the attention"):
        changed(backbone, {"sample_size": [8, 16]}, {}, [], change={ATTENTION: {"kind": "pyramid"}})


def test_its_output_is_compared_with_the_attentions():
    """By hand, at the states that the loss draws; nothing that comes after it gets a gradient."""
    teacher = load("shapes")
    teacher.denoiser.requires_grad_(False)
    network = source_of(teacher)
    made = changed(network.backbone, {}, {}, [], change={ATTENTION: {"kind": "pyramid"}})
    student = network.twin(made.requires_grad_(True).eval(), network.schedule)
    objective = Compression(
        teacher=network, student=Generator(student, (1.0,)), taps=(ATTENTION,), scale="norm",
        task=0, output=0, drop=0.0,
    )  # fmt: skip
    cond = teacher.codec.condition(["a red circle"] * 4)
    torch.manual_seed(0)
    batch = Batch(torch.randn(4, *teacher.shape), torch.randn(4, *teacher.shape), cond)
    torch.manual_seed(1)
    loss = objective.loss(batch, 0)
    loss.value.backward()
    torch.manual_seed(1)
    t = objective.times.sample(batch.x, network.process)
    x_t = network.process.noise(batch.x, t, torch.randn_like(batch.x))
    found = []
    for denoiser in (student, network):
        with torch.no_grad(), tapped(denoiser, [f"backbone.{ATTENTION}"]) as outputs:
            denoiser(x_t, t, cond)
        found.append(outputs[f"backbone.{ATTENTION}"])
    expected = (found[0] - found[1]).square().mean() / found[1].square().mean()
    torch.testing.assert_close(loss.value.detach(), expected)
    moved = {n for n, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert f"{ATTENTION}.out.weight" in moved and not any(n.startswith("up_") for n in moved)


def test_a_network_with_pyramids_leaves_as_a_folder(tmp_path):
    """It takes some seconds: the folder is loaded in another process, whose pixels are compared."""
    teacher = load("shapes")
    network = source_of(teacher)
    made = changed(network.backbone, {}, {}, [], change={ATTENTION: {"kind": "pyramid"}})
    torch.nn.init.normal_(made.get_submodule(ATTENTION).out.weight, std=0.3)
    teacher = replace(teacher, denoiser=network.twin(made.eval(), network.schedule))
    folders.export(student_of(teacher), teacher, tmp_path / "student", {})
    generator, _ = folders.load_student(tmp_path / "student")
    again = network_of(generator.denoiser).backbone.get_submodule(ATTENTION)
    assert isinstance(again, Pyramid) and torch.equal(
        again.out.weight, made.get_submodule(ATTENTION).out.weight
    )
