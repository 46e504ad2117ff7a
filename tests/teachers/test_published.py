"""SiT, LightningDiT, VA-VAE and U-ViT against outputs of their published code, which are stored."""

import pytest
import torch
from safetensors.torch import save_file

from distill.config.schema import GuidanceSection, TeacherSection
from distill.sampling.guided_teacher import guided
from teachers import load
from teachers.imagenet import vae as autoencoders
from teachers.imagenet.parts import positions, rotation
from tests.helpers import imagenet, published
from tests.helpers.published import CASES, LABELS

HELPERS = {
    "sit": lambda: imagenet.sit(),
    "sit without variance": lambda: imagenet.sit(variance=False),
    "lightningdit": lambda: imagenet.lightningdit(hidden=50),
    "lightningdit with qk-norm": lambda: imagenet.lightningdit(hidden=50, qk_norm=True),
    "lightningdit without shifts": lambda: imagenet.lightningdit(hidden=50, shifts=False),
    "uvit": lambda: imagenet.uvit(depth=4),
    "uvit of a VP-SDE": lambda: imagenet.uvit(conv=True, time_mlp=True),
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    root = tmp_path_factory.mktemp("vae")
    imagenet.save("sit", root)
    return str(root / "vae")


def teacher_of(case, folder, vae):
    """The teacher of a file with a case's weights, and the case's reference."""
    found = published.reference(case)
    save_file(found.weights, folder / "network.safetensors")
    return load(str(folder / "network.safetensors"), vae=vae), found


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if v.guidance is None])
def test_a_network_gives_what_the_published_code_gives(case, tmp_path, vae):
    """To 1e-5 in float32, at the times and labels of the reference."""
    teacher, found = teacher_of(case, tmp_path, vae)
    times = torch.tensor(CASES[case].times)
    if CASES[case].repository == "U-ViT":
        scale = teacher.denoiser.backbone.config["time_scale"]
        stock, sign = times / scale - 1, 1
    else:  # its time is 1 where there is data; dx/dt = x - ε
        stock, sign = 1000 * (1 - times), -1
    with torch.no_grad():
        output = teacher.denoiser.backbone(found.input, stock, torch.tensor(LABELS)).sample
    assert found.output.std() > 0.3
    torch.testing.assert_close(sign * output, found.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if v.guidance is not None])
def test_guidance_of_three_channels_is_the_published_one(case, tmp_path, vae):
    """x̂ = x_t + σ dx/dt, with the dx/dt of the published forward_with_cfg."""
    teacher, found = teacher_of(case, tmp_path, vae)
    section = GuidanceSection(scale=CASES[case].guidance, channels=3)
    sigma = torch.tensor([1 - CASES[case].times[0]])
    process = teacher.denoiser.process
    t = process.time(sigma / (1 - sigma))
    x_t, cond = found.input[:1], teacher.codec.condition([LABELS[0]])
    with torch.no_grad():
        output = guided(TeacherSection(source="a", guidance=section), teacher)(x_t, t, cond)
    expected = x_t + sigma * found.output
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", HELPERS)
def test_the_published_classes_have_the_names_that_tests_use(case):
    """And the shapes, so that restatements elsewhere in the tests are of the real files."""
    weights = published.reference(case).weights
    expected = {k: tuple(v.shape) for k, v in HELPERS[case]().items()}
    assert {k: tuple(v.shape) for k, v in weights.items()} == expected


def test_the_tables_of_positions_are_the_published_ones():
    weights = published.reference("lightningdit").weights
    torch.testing.assert_close(positions(128, 4), weights["pos_embed"], atol=1e-6, rtol=0)
    turn = torch.stack([weights[k] for k in published.TABLES[1:]])
    torch.testing.assert_close(rotation(64, 4), turn, atol=1e-6, rtol=0)


def test_the_autoencoder_gives_what_the_published_code_gives(tmp_path):
    """Moments of the latents of a picture, and the picture of a latent."""
    weights, moments, picture = published.vae_reference()
    save_file(weights, tmp_path / "vae.safetensors")
    made = autoencoders.load(str(tmp_path / "vae.safetensors"), 4, "teacher")
    with torch.no_grad():
        found = made.encode(published.values("picture", published.PICTURE)).latent_dist.parameters
        drawn = made.decode(published.values("latent", published.LATENT)).sample
    assert moments.std() > 0.3 < picture.std()
    torch.testing.assert_close(found[:, :4], moments[:, :4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 4:], moments[:, 4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn, picture, atol=1e-5, rtol=1e-5)
