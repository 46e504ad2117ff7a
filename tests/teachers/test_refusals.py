"""Checkpoints whose parts do not go together: read rightly, or refused by name."""

import json
import shutil

import diffusers
import pytest
import torch

from students import Critic, schedulers
from students.critic import head
from students.export.folder import rehearse, request
from students.lora import unwrap
from teachers import load
from teachers.errors import clipped
from teachers.families.base import mode
from teachers.storage.diffusers_config import read
from tests.helpers import families
from tests.helpers.refusals import refused

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
FLOWS = [FLOW, {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True,
                "prediction_type": "flow_prediction"}]  # fmt: skip
EDMS = [{"_class_name": "EDMEulerScheduler"}, {"_class_name": "EDMDPMSolverMultistepScheduler"}]


def under(folder, tmp_path, config):
    """The pipeline with another scheduler."""
    copy = shutil.copytree(folder, tmp_path / "t")
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (copy / "model_index.json").write_text(json.dumps(index))
    return str(copy)


# ---- schedulers


@pytest.mark.parametrize("config", [*FLOWS, *EDMS], ids=lambda c: c["_class_name"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_schedulers_that_stable_diffusions_networks_do_not_go_with_are_refused(
    folders, name, config, tmp_path
):
    kind = "EDM" if "EDM" in config["_class_name"] else "flow matching"
    with refused("teacher '*/t'", config["_class_name"], kind, "StableDiffusion"):
        load(under(folders(name), tmp_path, config))


@pytest.mark.parametrize("config", FLOWS, ids=lambda c: c["_class_name"])
def test_flow_matching_under_a_unet_of_pixels_is_refused(pipelines, config, tmp_path):
    with refused("teacher '*/t'", config["_class_name"], "flow matching", "UNet2DModel"):
        load(under(pipelines["eps"], tmp_path, config))


def test_edms_second_scheduler_reads_a_unet_of_pixels_as_the_first_does(pipelines, tmp_path):
    one = load(str(pipelines["edm"]))
    config = json.loads((pipelines["edm"] / "scheduler" / "scheduler_config.json").read_text())
    config["_class_name"] = "EDMDPMSolverMultistepScheduler"
    two = load(under(pipelines["edm"], tmp_path, config))
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]), one.codec.condition([1, 2])
    torch.testing.assert_close(two.denoiser(x, t, cond), one.denoiser(x, t, cond))


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
                                  "DDIMScheduler", "DPMSolverMultistepScheduler",
                                  "UniPCMultistepScheduler"])  # fmt: skip
def test_noise_predicted_from_noise_alone_is_refused_under_every_scheduler(kind):
    """Euler's table ends just above zero, where the students' ends at it."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}
    with refused("teacher", "v_prediction"):
        read(kind, config, "teacher")
    read(kind, config | {"prediction_type": "v_prediction"}, "teacher")
    read(kind, config | {"rescale_betas_zero_snr": False}, "teacher")


@pytest.mark.parametrize("renoise", [True, False])
def test_students_of_zero_terminal_snr_are_sampled_by_their_pipeline(folders, renoise, tmp_path):
    config = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction",
              "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
              **families.BETAS}  # fmt: skip
    teacher = load(under(folders("sd2"), tmp_path, config))
    rehearse(schedulers.student(teacher, 2, None, renoise).eval(), teacher)


def test_times_that_run_backwards_are_refused():
    with refused("teacher", "invert_sigmas"):
        read("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "teacher")


# ---- autoencoders


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux-schnell", "pixart-sigma"])
def tiny(request, folders, tmp_path):
    """A family with an AutoencoderTiny for its VAE."""
    name = request.param
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folders(name), **({"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {})
    )
    torch.manual_seed(0)
    channels = pipe.vae.config.latent_channels
    pipe.vae = diffusers.AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    pipe.save_pretrained(tmp_path / "t")
    return load(str(tmp_path / "t"), **families.OPTIONS.get(name, {}))


def test_a_tiny_autoencoder_encodes_and_decodes_as_its_pipeline_does(tiny):
    vae, (height, width) = tiny.codec.pipe.vae, tiny.codec.size
    assert isinstance(vae, diffusers.AutoencoderTiny)
    images = torch.rand(2, 3, height, width) * 2 - 1
    x = tiny.codec.encode(images)
    assert x.shape == (2, *tiny.shape)
    with torch.no_grad():
        torch.testing.assert_close(x, vae.encode(images).latents)  # it has no scale, nor a shift
    student = schedulers.student(tiny, 1).eval()
    rehearse(student, tiny)  # compares its decoded pictures with the stock pipeline's
    pipe = tiny.codec.pipe
    pipe.set_progress_bar_config(disable=True)
    _, arguments = request(student, tiny)
    steps = {"num_inference_steps": 2, "output_type": "latent"}
    latents = next(iter(pipe(**arguments, **steps, generator=rng()).values()))
    shown = next(iter(pipe(**arguments, **steps | {"output_type": "pt"}, generator=rng()).values()))
    ours = tiny.codec.decode(unwrap(tiny.denoiser).unpack(latents, tiny.shape)) / 2 + 0.5
    torch.testing.assert_close(ours.clamp(0, 1), shown, atol=1e-5, rtol=0)


def rng():
    return torch.Generator().manual_seed(0)


def test_an_autoencoder_that_gives_no_latents_is_named():
    with refused("vae", "Strange"):
        mode(type("Strange", (dict,), {})())


# ---- critics


def bottomless(folders, tmp_path):
    """A UNet that goes straight up again."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders("sd"), safety_checker=None)
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(
        {**pipe.unet.config, "mid_block_type": None}
    )
    pipe.save_pretrained(tmp_path / "t")
    return load(str(tmp_path / "t"))


def test_a_critic_of_a_unet_without_a_middle_reads_its_last_way_down(folders, tmp_path):
    teacher = bottomless(folders, tmp_path)
    assert teacher.denoiser.backbone.mid_block is None
    assert teacher.denoiser.middle == "backbone.down_blocks.1"
    cond = teacher.codec.condition(["a"])
    critic = Critic(teacher.denoiser, teacher.shape, cond, (teacher.denoiser.middle,))
    x = torch.randn(3, *teacher.shape)
    both = {k: v.expand(3, *v.shape[1:]) for k, v in cond.items()}
    (feature,) = critic.features(x, torch.full((3,), 0.5), both)
    width = teacher.denoiser.backbone.config.block_out_channels[-1]
    assert feature.shape == (3, width, teacher.shape[1] // 2, teacher.shape[2] // 2)
    assert critic(x, torch.full((3,), 0.5), both).shape == (3,)


@pytest.mark.parametrize("size", [(5, 5), (6, 6), (7, 7), (9, 12), (8, 8), (21, 48)])
def test_heads_read_maps_of_every_size_and_of_others_than_their_own(size):
    torch.manual_seed(0)
    one = head(16, size)
    assert one(torch.randn(2, 16, *size)).shape == (2, 1, 1, 1)
    for other in ((size[0] + 3, size[1]), (size[1], size[0]), (16, 8)):
        assert one(torch.randn(2, 16, *other)).shape == (2, 1, 1, 1)


def test_of_their_own_size_heads_read_maps_untouched():
    torch.manual_seed(0)
    one, x = head(16, (8, 8)), torch.randn(2, 16, 8, 8)
    plain = x
    for layer in one:
        plain = layer(plain)
    assert torch.equal(one(x), plain)


# ---- what is echoed


def test_what_is_echoed_is_one_short_line():
    assert clipped("a\nb  c") == "a b c"
    long = clipped("start" + "x" * 5000 + "end")
    assert len(long) == 80 and long.startswith("start") and long.endswith("end") and "…" in long
    with refused("labels", "0 to 9") as error:
        load("digits").codec.condition(["9" * 5000])
    assert len(str(error.value)) < 200
    with refused("teacher 'digits'", "ooo…ooo") as error:
        load("digits", **{"o" * 5000: 1})
    assert len(str(error.value)) < 400
