"""VA-VAE and Stable Diffusion's autoencoder, from the files of latent diffusion."""

import pytest
import torch
import torch.nn.functional as F

from teachers import load
from teachers.imagenet import vae
from tests.helpers import imagenet
from tests.helpers.refusals import refused

CHANNELS, WIDTHS, LAYERS = 6, (32, 64), 1  # groups of 32, as in the real one


def convolution(name, inputs, outputs, side=3):
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, inputs, outputs):
    shapes = norm(f"{name}.norm1", inputs) | convolution(f"{name}.conv1", inputs, outputs)
    shapes |= norm(f"{name}.norm2", outputs) | convolution(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        shapes |= convolution(f"{name}.nin_shortcut", inputs, outputs, 1)
    return shapes


def attention(name, width):
    shapes = norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= convolution(f"{name}.{part}", width, width, 1)
    return shapes


def middle(side, width):
    shapes = block(f"{side}.mid.block_1", width, width) | attention(f"{side}.mid.attn_1", width)
    return shapes | block(f"{side}.mid.block_2", width, width)


def published(channels=CHANNELS, attends=True):
    """An autoencoder by latent diffusion's names, with attention at its lowest resolution."""
    (low, high), end = WIDTHS, WIDTHS[-1]
    shapes = convolution("encoder.conv_in", 3, low)
    shapes |= block("encoder.down.0.block.0", low, low)
    shapes |= convolution("encoder.down.0.downsample.conv", low, low)
    shapes |= block("encoder.down.1.block.0", low, high) | middle("encoder", end)
    shapes |= norm("encoder.norm_out", end) | convolution("encoder.conv_out", end, 2 * channels)
    shapes |= convolution("quant_conv", 2 * channels, 2 * channels, 1)
    shapes |= convolution("post_quant_conv", channels, channels, 1)
    shapes |= convolution("decoder.conv_in", channels, end) | middle("decoder", end)
    for i in range(LAYERS + 1):
        shapes |= block(f"decoder.up.1.block.{i}", high, high)
        shapes |= block(f"decoder.up.0.block.{i}", high if i == 0 else low, low)
    shapes |= convolution("decoder.up.1.upsample.conv", high, high)
    shapes |= norm("decoder.norm_out", low) | convolution("decoder.conv_out", low, 3)
    if attends:
        shapes |= attention("encoder.down.1.attn.0", high)
        for i in range(LAYERS + 1):
            shapes |= attention(f"decoder.up.1.attn.{i}", high)
    return imagenet.drawn(shapes)


def conv(w, name, x, **options):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def normal(w, name, x):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def run(w, name, x):
    y = conv(w, f"{name}.conv1", F.silu(normal(w, f"{name}.norm1", x)), padding=1)
    y = conv(w, f"{name}.conv2", F.silu(normal(w, f"{name}.norm2", y)), padding=1)
    return y + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in w else x)


def attend(w, name, x):
    if f"{name}.q.weight" not in w:
        return x
    y = normal(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", y).flatten(2) for part in "qkv")
    shares = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    return x + conv(w, f"{name}.proj_out", (v @ shares.transpose(1, 2)).view_as(x))


def through_middle(w, side, x):
    x = attend(w, f"{side}.mid.attn_1", run(w, f"{side}.mid.block_1", x))
    return run(w, f"{side}.mid.block_2", x)


def encoded(w, images):
    """Mean of the latents, without statistics."""
    x = run(w, "encoder.down.0.block.0", conv(w, "encoder.conv_in", images, padding=1))
    x = conv(w, "encoder.down.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = attend(w, "encoder.down.1.attn.0", run(w, "encoder.down.1.block.0", x))
    x = F.silu(normal(w, "encoder.norm_out", through_middle(w, "encoder", x)))
    moments = conv(w, "quant_conv", conv(w, "encoder.conv_out", x, padding=1))
    return moments.chunk(2, 1)[0]


def decoded(w, latents):
    x = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", latents), padding=1)
    x = through_middle(w, "decoder", x)
    for level in (1, 0):
        for i in range(LAYERS + 1):
            name = f"decoder.up.{level}"
            x = attend(w, f"{name}.attn.{i}", run(w, f"{name}.block.{i}", x))
        if level:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv(w, "decoder.up.1.upsample.conv", x, padding=1)
    return conv(w, "decoder.conv_out", F.silu(normal(w, "decoder.norm_out", x)), padding=1)


def saved(folder, weights, channels=CHANNELS, statistics=True):
    """VA-VAE's file, with more than the network in it, and its statistics."""
    path = folder / "vavae.pt"
    more = {"loss.logvar": torch.zeros(1), "foundation_model.model.cls": torch.zeros(2)}
    torch.save({"state_dict": weights | more}, path)
    mean, std = torch.linspace(-1, 2, channels), torch.linspace(0.5, 4, channels)
    view = (1, -1, 1, 1)
    if statistics:
        torch.save({"mean": mean.view(view), "std": std.view(view)}, folder / vae.STATISTICS)
    return str(path), mean.view(view), std.view(view)


def test_va_vae_is_the_published_function_with_its_statistics(tmp_path):
    """Latents (z - mean) / std of the encoder's, and the decoder's images of them: within 10⁻⁵."""
    weights = published()
    path, mean, std = saved(tmp_path, weights)
    network = vae.load(path, CHANNELS, "teacher 'a'")
    images, latents = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, CHANNELS, 4, 4)
    with torch.no_grad():
        found = network.encode(images).latent_dist.mode()
        expected = (encoded(weights, images) - mean) / std
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        pictures = decoded(weights, latents * std + mean)
        assert pictures.std() > 0.1
        torch.testing.assert_close(network.decode(latents).sample, pictures, atol=2e-5, rtol=1e-5)
    assert network.config["scaling_factor"] == 1


def test_the_deviation_of_its_latents_is_scaled_too(tmp_path):
    weights = published()
    plain = vae.config_of(weights, "a")
    assert plain["latent_channels"] == CHANNELS
    path, _, std = saved(tmp_path, weights)
    network = vae.load(path, CHANNELS, "teacher 'a'")
    images = torch.rand(1, 3, 8, 8)
    changed = vae.normalised(weights, torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double())
    assert torch.allclose(changed["quant_conv.weight"], weights["quant_conv.weight"])
    torch.save({"mean": torch.zeros(CHANNELS), "std": torch.ones(CHANNELS)},
               tmp_path / vae.STATISTICS)  # fmt: skip
    unit = vae.load(path, CHANNELS, "teacher 'a'")
    with torch.no_grad():
        one, other = (n.encode(images).latent_dist.std for n in (network, unit))
    torch.testing.assert_close(one * std, other, atol=1e-6, rtol=1e-4)


def test_stable_diffusions_autoencoder_keeps_its_scale(tmp_path):
    weights = published(4, attends=False)
    path, _, _ = saved(tmp_path, weights, 4, statistics=False)
    network = vae.load(path, 4, "teacher 'a'")
    assert network.config["scaling_factor"] == 0.18215
    assert not any("Attn" in k for k in network.config["down_block_types"])
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        found = network.encode(images).latent_dist.mode()
    torch.testing.assert_close(found, encoded(weights, images), atol=1e-5, rtol=1e-5)


def test_a_teachers_codec_has_the_statistics_and_its_student_the_pixels(tmp_path):
    """VA-VAE's shape under a LightningDiT of four channels: the codec, and DiT's pipeline."""
    weights = published(4)
    path, mean, std = saved(tmp_path, weights, 4)
    teacher = load(imagenet.save("lightningdit", tmp_path), vae=path)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = (encoded(weights, images) - mean) / std
    latents = teacher.codec.encode(images)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    made = teacher.codec.decode(latents)
    torch.testing.assert_close(made, decoded(weights, latents * std + mean), atol=2e-5, rtol=1e-5)


def test_files_that_are_not_whole_are_refused(tmp_path):
    weights = published()
    path, _, _ = saved(tmp_path, weights, statistics=False)
    with refused("teacher 'a'", "vae", vae.STATISTICS):
        vae.load(path, CHANNELS, "teacher 'a'")
    saved(tmp_path, weights)
    with refused("teacher 'a'", "vae", "32"):
        vae.load(path, 32, "teacher 'a'")
    for content in ({"mean": torch.zeros(2), "std": torch.ones(2)},
                    {"mean": torch.zeros(6), "std": torch.zeros(6)}, {"mean": 1}):  # fmt: skip
        torch.save(content, tmp_path / vae.STATISTICS)
        with refused("teacher 'a'", "vae", vae.STATISTICS):
            vae.load(path, CHANNELS, "teacher 'a'")
    saved(tmp_path, {k: v for k, v in weights.items() if "mid.block_1" not in k})
    with refused("teacher 'a'", "vae", "mid_block"):
        vae.load(path, CHANNELS, "teacher 'a'")
    saved(tmp_path, {"a": torch.ones(1)})
    with refused("teacher 'a'", "vae"):
        vae.load(path, CHANNELS, "teacher 'a'")


@pytest.mark.parametrize("source", ["no/such/folder", "nothing"])
def test_an_autoencoder_that_is_not_there_is_refused(source):
    with refused("teacher 'a'", "vae", source):
        vae.load(source, 4, "teacher 'a'")
