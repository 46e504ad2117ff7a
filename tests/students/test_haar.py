"""Networks on Haar coefficients: the transform, the network around a UNet, and its folder."""

import json

import pytest
import torch

from students import schedulers
from students.architecture.change import changed, changed_teacher
from students.export.folder import export, load_student, rehearse, sample_student
from students.lora import network_of
from teachers import load
from teachers.process import Karras
from teachers.reduced.haar import HaarUNet2DModel, haar, inverse_haar
from tests.helpers.refusals import refused

D = torch.float64


def test_the_transform_is_orthonormal_and_its_inverse_exact():
    x = torch.randn(3, 2, 8, 6, dtype=D)
    w = haar(x)
    assert w.shape == (3, 8, 4, 3)
    assert (inverse_haar(w) - x).abs().max() < 1e-12
    torch.testing.assert_close(w.square().flatten(1).sum(1), x.square().flatten(1).sum(1))
    rows = haar(torch.eye(64, dtype=D).view(64, 1, 8, 8)).flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(64, dtype=D), atol=1e-12, rtol=0)


def test_coefficients_are_twice_the_average_and_halved_differences():
    (a, b), (c, d) = square = torch.tensor([[1.0, 2.0], [5.0, 11.0]], dtype=D)
    w = haar(square.view(1, 1, 2, 2)).flatten()
    expected = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]
    torch.testing.assert_close(w, torch.stack(expected) / 2)
    assert haar(torch.ones(1, 1, 4, 4, dtype=D))[:, 1:].abs().max() == 0


def test_a_process_of_images_is_the_same_process_of_their_coefficients():
    """So a posterior of coefficients is the coefficients of the posterior, noise included."""
    process = Karras()
    x, x_t, eps = torch.randn(3, 2, 1, 4, 4, dtype=D)
    t, s = (torch.full((2,), v, dtype=D) for v in (0.7, 0.4))
    of_images = haar(process.posterior(x_t, x, t, s, eps))
    of_coefficients = process.posterior(haar(x_t), haar(x), t, s, haar(eps))
    torch.testing.assert_close(of_images, of_coefficients)


def test_the_network_is_a_unet_of_half_the_side_between_two_transforms():
    from diffusers import UNet2DModel

    backbone = load("digits").denoiser.backbone
    torch.manual_seed(0)
    made = changed(backbone, {"block_out_channels": [16, 32]}, {}, [], fresh=True, haar=True)
    assert type(made) is HaarUNet2DModel
    assert made.config.in_channels == 1 and made.config.sample_size == 8  # what pipelines read
    inner = {**made.config, "in_channels": 4, "out_channels": 4, "sample_size": 4}
    plain = UNet2DModel.from_config({k: v for k, v in inner.items() if k[0] != "_"})
    plain.load_state_dict(made.state_dict())
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([1.0, -2.0]), torch.tensor([3, 4])
    with torch.no_grad():
        expected = inverse_haar(plain(haar(x), t, label).sample)
        torch.testing.assert_close(made(x, t, label).sample, expected)
        assert torch.equal(made(x, t, label, return_dict=False)[0], made(x, t, label).sample)


def test_noise_is_nothing_at_first_and_fresh_in_each_call():
    backbone = load("digits").denoiser.backbone
    made = changed(backbone, {}, {}, [], fresh=True, haar=True, noise=4)
    x, t, label = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.tensor([3, 4])
    with torch.no_grad():
        assert torch.equal(made(x, t, label).sample, made(x, t, label).sample)
        made.time_embedding.noise[2].weight.normal_()
        assert not torch.allclose(made(x, t, label).sample, made(x, t, label).sample)


@pytest.mark.parametrize("noise", [0, 4])
def test_its_folder_loads_elsewhere_and_here(noise, tmp_path):
    """The network's own noise is drawn from a seed, so that pixels can be compared."""
    teacher = load("digits", null_label=10)
    config = {"block_out_channels": [8, 16]}
    own = changed_teacher(teacher, config, {}, [], fresh=True, haar=True, noise=noise)
    student = schedulers.student(own, 2, 5.0, "posterior")
    if noise:
        network_of(student.denoiser).backbone.time_embedding.noise[2].weight.data.normal_()
    rehearse(student, teacher)  # compares pixels
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # again
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["unet"] == ["haarunet2dmodel", "HaarUNet2DModel"]
    again, itself = load_student(tmp_path / "student")
    assert isinstance(network_of(again.denoiser).backbone, HaarUNet2DModel)
    torch.testing.assert_close(
        sample_student(again, itself, [3, 4], 7), sample_student(student, teacher, [3, 4], 7),
        atol=2e-4, rtol=1e-3,
    )  # fmt: skip


def test_drawing_leaves_the_global_generator_as_it_was():
    teacher = load("digits", null_label=10)
    student = schedulers.student(teacher, 1)
    before = torch.get_rng_state()
    sample_student(student, teacher, [3], 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_networks_and_odd_sizes_are_refused():
    with refused("student.architecture.haar", "UNet2DConditionModel"):
        changed(load("shapes").denoiser.backbone, {}, {}, [], fresh=True, haar=True)
    with refused("student.architecture.haar", 7):
        changed(load("digits").denoiser.backbone, {"sample_size": 7}, {}, [], fresh=True, haar=True)
