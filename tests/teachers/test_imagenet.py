"""SiT, LightningDiT and U-ViT: their published functions, names, noise levels and files."""

import argparse
import math

import pytest
import torch
from safetensors.torch import save_file

from distill.config.schema import GuidanceSection, TeacherSection
from distill.sampling.guided_teacher import guided
from teachers import load
from teachers.denoiser import Guided
from teachers.imagenet import checkpoints
from teachers.imagenet.names import SIT, UVIT, ours, published, without_variance
from teachers.imagenet.parts import positions, rotation
from teachers.process import Linear, Trig
from tests.helpers import imagenet
from tests.helpers.refusals import refused

VARIANTS = {
    "sit": ("sit", {}),
    "sit without variance": ("sit", {"variance": False}),
    "lightningdit": ("lightningdit", {}),
    "lightningdit with qk-norm": ("lightningdit", {"qk_norm": True}),
    "lightningdit without shifts": ("lightningdit", {"shifts": False}),
    "uvit": ("uvit", {"depth": 4}),
    "uvit of a VP-SDE": ("uvit", {"conv": True, "time_mlp": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for name in imagenet.PUBLISHED:
        imagenet.save(name, root)
    return root


def loaded(folder, name="sit", **options):
    return load(str(folder / f"{name}.pt"), vae=str(folder / "vae"), **options)


def read(folder, weights, name="made.safetensors", **options):
    """A teacher of these published weights."""
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / name)
    return load(str(folder / name), vae=str(folder / "vae"), **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_is_the_published_function(folder, variant):
    """Against a restatement from the published names: within 10⁻⁵ of outputs of size 1."""
    name, options = VARIANTS[variant]
    weights = imagenet.PUBLISHED[name](**options)
    network = read(folder, weights).denoiser.backbone
    x, labels = torch.randn(2, 4, 8, 8), [3, imagenet.CLASSES]  # the last is none
    stock = torch.tensor([250.0, 900.0])
    with torch.no_grad():
        found = network(x, stock, torch.tensor(labels)).sample
    for image, label, time, result in zip(x, labels, stock.tolist(), found, strict=True):
        if name == "uvit":
            own = (0.999 if options.get("conv") else 1.0) * (time + 1)
            expected = imagenet.uvit_eps(weights, image, own, label)
        else:
            expected = -imagenet.sit_velocity(weights, image, 1 - time / 1000, label)
        assert expected.std() > 0.1
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_the_tables_of_positions_are_exact():
    torch.testing.assert_close(positions(128, 4), imagenet.table(128, 4), atol=1e-6, rtol=0)
    expected = torch.stack(imagenet.turns(72, 16))
    torch.testing.assert_close(rotation(72, 16), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_converted_both_ways(variant):
    name, options = VARIANTS[variant]
    weights, names = imagenet.PUBLISHED[name](**options), UVIT if name == "uvit" else SIT
    again = published(ours(weights, names), names)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], v) for k, v in weights.items())


def test_a_learned_variance_is_dropped_from_every_pixel():
    weight = torch.arange(4 * 2 * 3.0).view(4 * 2 * 3, 1)  # four pixels of twice three channels
    found = without_variance(weight, 3).flatten().tolist()
    assert found == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]


# ---- noise levels, and the direction of time


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_sits_paths_are_one_process_with_its_velocities(folder, interpolant):
    """x̂ from dx/dt on SiT's own path, at its own time, in closed form."""
    denoiser = loaded(folder, interpolant=interpolant).denoiser
    assert denoiser.process == Linear()
    weights = imagenet.sit()
    x, eps, t = torch.randn(4, 8, 8), torch.randn(4, 8, 8), 0.3  # t = 1 is data
    if interpolant == "linear":
        alpha, sigma, d_alpha, d_sigma = t, 1 - t, 1.0, -1.0
    else:
        a = math.pi / 2 * t
        alpha, sigma = math.sin(a), math.cos(a)
        d_alpha, d_sigma = math.pi / 2 * math.cos(a), -math.pi / 2 * math.sin(a)
    x_t = alpha * x + sigma * eps
    velocity = imagenet.sit_velocity(weights, x_t, t, 2)
    # of the two equations for x and ε
    expected = (d_sigma * x_t - sigma * velocity) / (d_sigma * alpha - sigma * d_alpha)
    level = torch.tensor([sigma / (alpha + sigma)])
    cond = {"class_labels": torch.tensor([2])}
    with torch.no_grad():
        found = denoiser(x_t[None] / (alpha + sigma), level, cond)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_sit_of_the_gvp_path_is_a_velocity_network_of_trigflow(folder):
    """The same network read as one of `Trig` that predicts v, at equal σ/α."""
    denoiser = loaded(folder, interpolant="gvp").denoiser
    t = torch.tensor([0.2, 0.7])
    alpha, sigma = Trig().scales(t.double())
    linear = Linear().time(sigma / alpha).float()
    x_t, cond = torch.randn(2, 4, 8, 8), {"class_labels": torch.tensor([0, 5])}
    v = torch.stack([
        -2 / math.pi * imagenet.sit_velocity(imagenet.sit(), x, 1 - float(s), int(k))
        for x, s, k in zip(x_t, t, cond["class_labels"])
    ])  # fmt: skip
    expected = alpha.view(-1, 1, 1, 1) * x_t - sigma.view(-1, 1, 1, 1) * v
    scaled = x_t / (alpha + sigma).view(-1, 1, 1, 1)
    with torch.no_grad():
        found = denoiser(scaled.float(), linear, cond)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)


def test_lightningdits_noise_levels_are_those_of_its_sampler(folder):
    """Its times run from noise to data and are shifted by 0.3."""
    process = loaded(folder, "lightningdit").denoiser.process
    n = torch.linspace(0, 1, 11, dtype=torch.float64)
    own = 0.3 * n / (1 + (0.3 - 1) * n)
    torch.testing.assert_close(process.scales(1 - n)[1], 1 - own)
    assert loaded(folder, "lightningdit", shift=1.0).denoiser.process == Linear(1.0)


def test_uvits_noise_levels_are_those_that_it_was_trained_with(folder):
    index = torch.tensor([0, 499, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)[index]
    t = (index + 1).double() / 1000
    continuous = torch.exp(-(0.1 * t + (20 - 0.1) * t**2 / 2))
    for weights, expected in ((imagenet.uvit(), bar), (imagenet.uvit(conv=True), continuous)):
        denoiser = read(folder, weights).denoiser
        alpha, _ = denoiser.process.scales(index.double() / 999)
        torch.testing.assert_close(alpha**2, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(denoiser.time(index.double() / 999), index.double())


# ---- files


def test_a_files_sizes_and_training_options_are_read(folder, tmp_path):
    teacher = loaded(folder)
    config = teacher.denoiser.backbone.config
    assert (config["depth"], config["heads"], config["mlp_width"]) == (2, 2, 64)
    assert teacher.shape == (4, 8, 8) and teacher.codec.classes == imagenet.CLASSES
    assert teacher.codec.null["class_labels"].tolist() == [imagenet.CLASSES]
    imagenet.save("sit", tmp_path, path_type="GVP", prediction="velocity")
    assert loaded(tmp_path).denoiser.backbone.config["interpolant"] == "gvp"
    imagenet.save("sit", tmp_path, prediction="noise")
    with refused("teacher '*/sit.pt'", "noise"):
        loaded(tmp_path)


def test_published_sizes_give_the_published_heads():
    with torch.device("meta"):
        for width, heads in ((384, 6), (768, 12), (1024, 16), (1152, 16)):
            weights = {
                "x_embedder.proj.weight": torch.empty(width, 4, 2, 2),
                "y_embedder.embedding_table.weight": torch.empty(1001, width),
                "pos_embed": torch.empty(1, 256, width),
                "blocks.0.mlp.fc1.weight": torch.empty(4 * width, width),
            }
            config = checkpoints.config_of("SiTModel", weights, None, "teacher")
            assert config["heads"] == heads


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.weight"), "blocks.1.attention.qkv.weight"),
        (lambda w: w.pop("pos_embed"), "pos_embed"),
        (lambda w: w.update(extra=torch.ones(2)), "extra"),
        (lambda w: w.update(pos_embed=torch.ones(1, 15, 128)), "15 positions"),
        (lambda w: w.update({"t_embedder.mlp.0.bias": torch.ones(3)}), "time.0.bias"),
        (lambda w: w.pop("y_embedder.embedding_table.weight"), "U-ViT"),
    ],
)
def test_damaged_weights_are_refused_in_one_line(folder, change, words):
    weights = imagenet.sit()
    change(weights)
    with refused("teacher '*'", words):
        read(folder, weights)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("uvit", "decoder_pred.bias", None),
        ("uvit", "label_emb.weight", torch.tensor(1.0)),
        ("sit", "final_layer.linear.bias", torch.tensor(1.0)),
        ("sit", "final_layer.linear.weight", torch.ones(3)),
    ],
)
def test_damaged_ends_of_networks_are_refused_in_one_line(folder, name, key, value):
    weights = imagenet.PUBLISHED[name]()
    assert key in weights
    weights = {k: v for k, v in weights.items() if k != key}
    with refused("teacher '*'"):
        read(folder, weights if value is None else {**weights, key: value})


class Foreign:
    """A class that no weight file needs."""


@pytest.mark.parametrize("content", [Foreign(), [1, 2], {"ema": {"a": 3}}, {}, "half", "empty"])
def test_files_of_other_things_are_refused_and_not_executed(folder, content):
    path = folder / "other.pt"
    if content == "half":
        path.write_bytes((folder / "sit.pt").read_bytes()[:5000])
    elif content == "empty":
        path.write_bytes(b"")
    else:
        torch.save(content, path)
    with refused("teacher '*/other.pt'"):
        load(str(path), vae=str(folder / "vae"))


def test_options_that_do_not_fit_are_refused(folder):
    with refused("teacher '*'", "interpolant"):
        loaded(folder, "lightningdit", interpolant="gvp")
    with refused("teacher '*'", "shift"):
        loaded(folder, "uvit", shift=2.0)
    with refused("teacher '*'", "heads", 3):
        loaded(folder, heads=3)
    with refused("teacher '*'", "vae", "sd-vae-ft-ema"):
        load(str(folder / "sit.pt"))
    with refused("teacher '*'", "guide"):
        loaded(folder, guide=2)
    with refused("teacher '*'", "channels", 64):
        section = TeacherSection(source="a", guidance=GuidanceSection(scale=2, channels=64))
        teacher = loaded(folder)
        try:
            guided(section, teacher)
        except Exception as error:
            raise type(error)(f"teacher 'a': {error}") from None


def test_a_dits_file_is_not_taken_for_a_sits(folder):
    path = folder / "DiT-XL-2-256x256.pt"
    torch.save(imagenet.sit(), path)
    with refused("teacher '*'", "facebook/DiT-XL-2-256"):
        load(str(path), vae=str(folder / "vae"))


def test_training_options_of_any_kind_are_data(folder):
    """SiT's scripts pickle an argparse.Namespace; nothing else of Python's is let in."""
    path = folder / "options.pt"
    torch.save({"ema": imagenet.sit(), "args": argparse.Namespace(path_type="Linear")}, path)
    load(str(path), vae=str(folder / "vae"))
    torch.save({"ema": imagenet.sit(), "args": Foreign()}, path)
    with refused("teacher '*/options.pt'", "Foreign"):
        load(str(path), vae=str(folder / "vae"))


# ---- guidance


def test_guidance_of_the_first_channels_is_the_published_one(folder):
    """SiT and LightningDiT guide three channels of dx/dt; x̂ of the others is unguided."""
    teacher = loaded(folder)
    section = TeacherSection(source="a", guidance=GuidanceSection(scale=4, channels=3))
    t, x_t = torch.tensor([0.6]), torch.randn(1, 4, 8, 8)
    cond = teacher.codec.condition([2])
    with torch.no_grad():
        found = guided(section, teacher)(x_t, t, cond)
    weights = imagenet.sit()
    with_label, without = (imagenet.sit_velocity(weights, x_t[0], 0.4, k) for k in (2, 7))
    velocity = with_label.clone()
    velocity[:3] = without[:3] + 4 * (with_label[:3] - without[:3])
    torch.testing.assert_close(found[0], x_t[0] + 0.6 * velocity, atol=1e-5, rtol=1e-4)


def test_an_interval_of_lightningdits_is_one_of_noise_levels(folder):
    """Its code guides where its own t ≥ 0.125, which is σ/α ≤ 7."""
    teacher = loaded(folder, "lightningdit", shift=1.0)
    guidance = GuidanceSection(scale=6.7, channels=3, interval=(0, 7))
    denoiser = guided(TeacherSection(source="a", guidance=guidance), teacher)
    x_t, cond = torch.randn(2, 4, 8, 8), teacher.codec.condition([1, 2])
    with torch.no_grad():
        for sigma, guides in ((0.874, True), (0.876, False)):
            t = torch.full((2,), sigma)
            plain = teacher.denoiser(x_t, t, cond)
            assert torch.equal(denoiser(x_t, t, cond), plain) != guides
    assert isinstance(denoiser.guided, Guided)
