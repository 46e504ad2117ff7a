"""EDM's and EDM2's networks, against figures that the published code gave for the same weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from teachers import Karras, load
from teachers.denoiser import Guided
from teachers.denoiser import edm as preconditioning
from teachers.edm import checkpoints
from teachers.edm.latents import Latents
from teachers.edm.model import EDM
from tests.helpers import edm_pickles
from tests.helpers.edm_pickles import CASES, inputs
from tests.helpers.refusals import refused

KNOWN, FIGURES = edm_pickles.golden()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every golden case as a pickle, and as the folder that it converts to."""
    root = tmp_path_factory.mktemp("edm")
    for name in CASES:
        checkpoints.convert(edm_pickles.save(KNOWN[name], root / f"{name}.pkl"), root / name)
    return root


def conditions(teacher):
    """The golden runs' labels: the last class, the first, and none."""
    classes = teacher.denoiser.backbone.network.label_dim
    return {"class_labels": torch.tensor([classes - 1, 0, classes])} if classes else None


@pytest.mark.parametrize("name", CASES)
def test_a_network_gives_what_the_published_code_gives(files, name):
    teacher = load(str(files / name))
    channels, size, _ = teacher.shape
    x, sigma = inputs(channels, size)
    cond = conditions(teacher)
    labels = None if cond is None else cond["class_labels"]
    raw = teacher.denoiser.backbone.network(x, sigma.log() / 4, labels)
    expected = FIGURES[f"{name}.raw"]
    assert expected.std() > 0.3
    torch.testing.assert_close(raw, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adm", "skip", "edm2"])
def test_a_denoiser_gives_what_the_published_code_gives(files, name):
    teacher = load(str(files / name))
    channels, size, _ = teacher.shape
    x, sigma = inputs(channels, size)
    t = teacher.denoiser.process.time(sigma.double())
    denoised = teacher.denoiser(x, t, conditions(teacher))
    torch.testing.assert_close(denoised, FIGURES[f"{name}.denoised"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["edm2", "edm2-pixels"])
def test_edm2s_uncertainty_is_the_published_codes(files, name):
    denoiser = load(str(files / name)).denoiser
    assert isinstance(denoiser, EDM)
    t = denoiser.process.time(torch.tensor([0.01, 1.0, 40.0], dtype=torch.double))
    torch.testing.assert_close(denoiser.logvar(t), FIGURES[f"{name}.logvar"])


def test_gains_stored_in_half_precision_are_applied_as_the_published_code_applies_them(tmp_path):
    teacher = load(str(edm_pickles.save(KNOWN["edm2"], tmp_path / "half.pkl", half=True)))
    x, sigma = inputs(4, 16)
    raw = teacher.denoiser.backbone.network(x, sigma.log() / 4, conditions(teacher)["class_labels"])
    expected = FIGURES["edm2-half.raw"]
    assert (expected - FIGURES["edm2.raw"]).abs().max() > 1e-3
    torch.testing.assert_close(raw, expected, atol=2e-5, rtol=1e-5)


def test_a_pickle_and_its_folder_are_one_teacher(files):
    pickled, converted = load(str(files / "adm.pkl")), load(str(files / "adm"))
    ours, theirs = pickled.denoiser.state_dict(), converted.denoiser.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert pickled.shape == converted.shape == (3, 16, 16)
    assert not any(p.requires_grad for p in converted.denoiser.parameters())


def test_without_a_network_there_is_only_the_skip(files):
    teacher = load(str(files / "skip"))  # its σ_data is 0.7
    for p in teacher.denoiser.backbone.network.heads.parameters():
        p.zero_()
    x, sigma = inputs(3, 16)
    t = teacher.denoiser.process.time(sigma.double())
    expected = 0.49 / (sigma**2 + 0.49).view(3, 1, 1, 1) * x
    torch.testing.assert_close(teacher.denoiser(x, t), expected)


def test_the_weight_is_edms(files):
    denoiser = load(str(files / "ddpmpp")).denoiser
    sigma = torch.tensor([0.01, 1.0, 40.0], dtype=torch.double)
    lam = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    torch.testing.assert_close(denoiser.weight(denoiser.process.time(sigma)), lam)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_weight(files, name):
    denoiser = load(str(files / name)).denoiser.requires_grad_(True)
    channels, size = (4, 16) if name == "edm2" else (3, 16)
    x = torch.randn(2, channels, size, size)
    labels = torch.tensor([0, 1]) if denoiser.backbone.network.label_dim else None
    cond = None if labels is None else {"class_labels": labels}
    denoiser.loss(x, torch.tensor([0.3, 0.7]), cond).backward()
    still = [
        k for k, p in denoiser.backbone.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert not still


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_dropout_is_off_in_eval_mode(files, name):
    denoiser = load(str(files / name)).denoiser
    x, t = (
        torch.randn(2, denoiser.backbone.network.stem.weight.shape[1] - (name == "edm2"), 16, 16),
        0.5,
    )
    t = torch.full((2,), t)
    assert torch.equal(denoiser(x, t), denoiser(x, t))
    denoiser.train()
    assert not torch.equal(denoiser(x, t), denoiser(x, t))


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_a_network_runs_in_the_type_of_its_weights(files, name):
    denoiser = load(str(files / name)).denoiser
    assert next(denoiser.backbone.parameters()).dtype == torch.float32  # whatever use_fp16 says
    x, t = torch.randn(2, 4 if name == "edm2" else 3, 16, 16), torch.tensor([0.5, 0.8])
    full = denoiser(x, t)
    denoiser.backbone.to(torch.bfloat16)
    low = denoiser(x, t)
    assert low.dtype == torch.float32
    assert 0 < (low - full).std() < 0.1 * full.std()


def test_no_label_is_a_row_of_zeros_only_where_dropout_taught_it(files):
    taught, untaught = load(str(files / "adm")), load(str(files / "ddpmpp-labels"))
    assert taught.codec.classes == 5
    assert taught.codec.null == {"class_labels": torch.tensor([5])}
    assert untaught.codec.null is None
    assert load(str(files / "ddpmpp-labels"), null_label=10).codec.null is not None
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    assert torch.equal(taught.denoiser(x, t, taught.codec.null), taught.denoiser(x, t))
    cond = taught.codec.condition([3])
    guided = Guided(taught.denoiser, 2.0, taught.codec.null)(x, t, cond)
    by_hand = 2 * taught.denoiser(x, t, cond) - taught.denoiser(x, t)
    torch.testing.assert_close(guided, by_hand, atol=1e-5, rtol=1e-5)


def test_a_null_label_that_the_network_has_not_is_refused(files):
    with refused("teacher '*/ddpmpp-labels'", "10"):
        load(str(files / "ddpmpp-labels"), null_label=3)
    with refused("teacher '*/ddpmpp'", "0"):
        load(str(files / "ddpmpp"), null_label=0)
    with refused("teacher '*/ddpmpp'", "null_label"):
        load(str(files / "ddpmpp"), nul_label=0)


def test_a_student_can_be_made_of_what_the_denoiser_says(files):
    source = load(str(files / "ddpmpp-labels")).denoiser
    process = source.process
    assert process == Karras(0.002, 80.0, 7.0)
    predicts = preconditioning(source.schedule.sigma_data, process.sigma_min)
    student = EDM(source.backbone, replace(source.schedule, predicts=predicts))
    x = torch.randn(2, 3, 16, 16)
    ends = torch.zeros(2, dtype=torch.double)
    torch.testing.assert_close(student(x, ends), x)  # a consistency model's boundary
    torch.testing.assert_close(source.time(torch.ones(1)), torch.tensor([80.0]).log() * 250)


def test_latents_are_scaled_to_edm2s_statistics(files):
    codec = load(str(files / "edm2")).codec
    assert isinstance(codec, Latents)
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    torch.testing.assert_close(codec.scale, 0.5 / std)
    torch.testing.assert_close(codec.bias, -0.5 * mean / std)
    latents = torch.randn(1, 4, 2, 2)
    assert codec.decode(latents) is latents and codec.encode(latents) is latents


def test_a_vae_beside_the_weights_decodes_the_latents(files, tmp_path):
    from diffusers import AutoencoderKL

    shutil.copytree(files / "edm2", tmp_path / "with")
    widths = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4}
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = AutoencoderKL(**widths, **kinds).eval()
    vae.save_pretrained(tmp_path / "with" / "vae")
    codec = load(str(tmp_path / "with")).codec
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(images / 2 + 0.5).latent_dist  # EDM2's VAE sees pixels in [0, 1]
        torch.manual_seed(0)
        raw = moments.sample()
        torch.manual_seed(0)
        data = codec.encode(images)
        torch.testing.assert_close(
            data, raw * codec.scale[:, None, None] + codec.bias[:, None, None]
        )
        expected = vae.decode(raw).sample.clamp(0, 1) * 2 - 1
        torch.testing.assert_close(codec.decode(data), expected, atol=1e-5, rtol=1e-5)


def test_a_vae_of_another_shape_is_refused(files, tmp_path):
    with refused("teacher '*/ddpmpp'", "network"):
        load(str(files / "ddpmpp"), vae=str(tmp_path))
    with refused("teacher '*/edm2'", "config.json"):
        load(str(files / "edm2"), vae=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_resolution": 10**9}, ("teacher '*/odd'", "SongUNet")),
        ({"num_blocks": 10**9}, ("teacher '*/odd'", "SongUNet")),
        ({"channel_mult": [1] * 99}, ("teacher '*/odd'", "SongUNet")),
        ({"channel_mult": "12"}, ("teacher '*/odd'", "SongUNet")),
        ({"resample_filter": [1, 0, 1]}, ("teacher '*/odd'", "SongUNet")),
        ({"img_resolution": 15}, ("teacher '*/odd'", "1")),
        ({"encoder_type": "residula"}, ("teacher '*/odd'", "SongUNet")),
        ({"model_chanels": 8}, ("teacher '*/odd'", "model_channels")),
        ({"model_channels": 2**16}, ("teacher '*/odd'", "stem.weight", "8", "3")),
        ({"num_blocks": 2}, ("teacher '*/odd'", "decoder.16.blocks.2.conv_in.bias")),
        ({"label_dim": 0}, ("teacher '*/odd'", "label.bias")),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_built(
    files, tmp_path, change, said
):
    shutil.copytree(files / "ddpmpp-labels", tmp_path / "odd")
    path = tmp_path / "odd" / "config.json"
    config = json.loads(path.read_text())
    config["arguments"] |= change
    path.write_text(json.dumps(config))
    with refused(*said):
        load(str(tmp_path / "odd"))


def test_damaged_weights_are_refused(files, tmp_path):
    shutil.copytree(files / "ddpmpp", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with refused("teacher '*/cut'", "read"):
        load(str(tmp_path / "cut"))
    weights.unlink()
    with refused("teacher '*/cut'", "convert"):
        load(str(tmp_path / "cut"))


def test_converting_overwrites_nothing(files, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("kept")
    with refused("*/there", "already"):
        checkpoints.convert(files / "ddpmpp.pkl", tmp_path / "there")
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "mine"]


def test_the_command_converts(files, tmp_path, capsys, monkeypatch):
    from distill import __main__ as cli

    words = ["distill", "convert", str(files / "ncsnpp.pkl"), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0, capsys.readouterr().err
    assert load(str(tmp_path / "out")).codec.classes == 10
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_autoencoder_that_is_neither_a_folder_nor_on_the_hub_is_refused(files, tmp_path):
    for place in ("nowhere", str(tmp_path / "nowhere")):
        with refused("teacher '*/edm2'", "nowhere", "Hub id"):
            load(str(files / "edm2"), vae=place)
