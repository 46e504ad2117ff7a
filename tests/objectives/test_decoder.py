"""A light decoder: what it learns, and the stock pipeline that it leaves in."""

import json

import pytest
import torch
import yaml

from distill.objectives.base import Batch
from distill.objectives.smaller.decoder import LightAutoencoder, LightDecoder
from distill.pretrain.pixels import teach
from students.export import folder as folders
from students.generator import Generator
from students.schedulers import student
from teachers import load
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def teacher():
    loaded = load("shapes")
    loaded.denoiser.requires_grad_(False)
    return loaded


def made(teacher, **keys):
    return LightDecoder(
        teacher=teacher.denoiser, student=Generator(teacher.denoiser),
        decoder=LightAutoencoder.for_objective(teacher), **keys,
    )  # fmt: skip


def batch_of(teacher, n=4):
    torch.manual_seed(0)
    cond = teacher.codec.condition(["a red circle"] * n)
    return Batch(torch.randn(n, *teacher.shape), torch.randn(n, *teacher.shape), cond)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_the_loss_is_the_distance_to_the_large_decoders_pictures(teacher, loss):
    objective = made(teacher, loss_of=loss, encoder=0.5)
    batch = batch_of(teacher)
    torch.manual_seed(1)
    found = objective.picture_loss(batch)
    torch.manual_seed(1)
    latents = objective.latents(batch)
    assert torch.equal(latents[:2], batch.x[:2])  # half are data
    large, tiny = teacher.codec.decode(latents), objective.decoder.tiny
    power = 1 if loss == "l1" else 2
    with torch.no_grad():
        picture = (tiny.decode(latents).sample - large).abs().pow(power).mean()
        latent = (tiny.encode(large).latents - latents).abs().pow(power).mean()
    torch.testing.assert_close(found.logs["picture"], picture)
    torch.testing.assert_close(found.value.detach(), picture + 0.5 * latent)
    found.value.backward()
    assert all(p.grad is not None for p in tiny.parameters())
    assert all(p.grad is None for p in teacher.codec.vae.parameters())


def test_half_of_the_latents_are_what_a_student_of_one_step_would_give(teacher):
    from distill.objectives.noise_levels import Uniform

    objective = made(teacher, times=Uniform(0.9999, 1.0))
    batch = batch_of(teacher)
    process = teacher.denoiser.process
    x_t = process.noise(batch.x[2:], torch.ones(2), batch.noise[2:])
    with torch.no_grad():
        expected = teacher.denoiser(x_t, torch.ones(2), {"text": batch.cond["text"][2:]})
    torch.testing.assert_close(objective.latents(batch)[2:], expected, rtol=1e-2, atol=1e-2)


def test_stages_double_the_sides_as_often_as_the_large_one(teacher):
    objective = made(teacher, width=8, blocks=2)
    x = torch.randn(2, *teacher.shape)
    assert objective.decoder.tiny.decode(x).sample.shape == teacher.codec.decode(x).shape
    small, large = (made(teacher, width=w).decoder.tiny.decoder for w in (8, 16))
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, large)]
    assert counts[0] < counts[1] < sum(p.numel() for p in teacher.codec.vae.decoder.parameters())


def test_a_teacher_of_pixels_has_no_decoder():
    with refused("objective.name", "autoencoder"):
        made(load("digits"))


def test_what_is_taught_is_a_stock_student_with_the_light_decoder(teacher, tmp_path):
    """Of a student: a folder that plain diffusers loads, and the agreement of the two decoders."""
    folders.export(student(teacher), teacher, tmp_path / "student", {})
    tree = {
        "teacher": {"source": str(tmp_path / "student")},
        "objective": {"name": "decoder", "width": 8},
        "data": {"source": "shapes"},
        "train": {"steps": 3, "batch": 4, "log_every": 1, "save_every": 2},
        "eval": {"protocol": None},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    summary = teach(str(file), tmp_path / "run", [], False)
    assert summary["decoder"]["weights"]["light"] < summary["decoder"]["weights"]["large"]
    assert 0 < summary["decoder"]["psnr_db"] < 40 and summary["steps"] == 3
    made_of = tmp_path / "run" / "student"
    index = json.loads((made_of / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    generator, loaded = folders.load_student(made_of)
    folders.verify(made_of, generator, loaded)  # in another process, by stock diffusers
    assert not list((tmp_path / "run").glob(".student*"))
    again = teach(str(file), tmp_path / "run", ["train.steps=4"], True)
    assert again["steps"] == 4
    with refused("teacher 'digits'", "pipeline"):
        teach(str(file), tmp_path / "other", ["teacher.source=digits"], False)
