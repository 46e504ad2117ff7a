"""Diffusers pipelines read as denoisers: compared with diffusers' own schedulers."""

import json
import shutil

import diffusers
import pytest
import torch

from teachers import load
from teachers.denoiser import Guided
from tests.helpers.refusals import refused


def stock(path, sigma_or_index, x_t, labels):
    """x̂ as the pipeline's own scheduler reads the network at one of its timesteps."""
    config = json.loads((path / "model_index.json").read_text())
    unet = diffusers.UNet2DModel.from_pretrained(path / "unet")
    scheduler = getattr(diffusers, config["scheduler"][1]).from_pretrained(path / "scheduler")
    with torch.no_grad():
        if isinstance(scheduler, diffusers.DDIMScheduler):
            scheduler.config.clip_sample = False
            scheduler.set_timesteps(1000)
            out = unet(x_t, sigma_or_index, class_labels=labels).sample
            return scheduler.step(out, sigma_or_index, x_t).pred_original_sample
        if isinstance(scheduler, diffusers.EDMEulerScheduler):
            scale, time = (
                1 / (sigma_or_index**2 + 0.25) ** 0.5,
                torch.tensor(sigma_or_index).log() / 4,
            )
            out = unet(x_t * scale, time, class_labels=labels).sample
            return scheduler.precondition_outputs(x_t, out, sigma_or_index)
        scheduler.set_timesteps(timesteps=[13])
        t = scheduler.timesteps[0]
        out = unet(scheduler.scale_model_input(x_t, t), t, class_labels=labels).sample
        scheduler.config.clip_denoised = False
        return scheduler.step(out, t, x_t).prev_sample  # one step: no noise is added


@pytest.mark.parametrize("kind", ["edm", "cm", "eps", "v", "sample", "unconditional"])
def test_the_denoiser_says_what_the_stock_scheduler_says(pipelines, kind):
    teacher = load(str(pipelines[kind]))
    labels = None if kind == "unconditional" else torch.tensor([3, 5])
    cond = None if labels is None else {"class_labels": labels}
    x_t = torch.randn(2, 1, 8, 8)
    if kind == "edm":
        where, t = 1.7, teacher.denoiser.process.time(torch.tensor(1.7, dtype=torch.double))
    elif kind == "cm":
        where, t = None, torch.tensor(1 - 13 / 39, dtype=torch.double)
    else:
        where, t = 400, torch.tensor(400 / 999, dtype=torch.double)
    ours = teacher.denoiser(x_t, t.expand(2), cond)
    torch.testing.assert_close(
        ours, stock(pipelines[kind], where, x_t, labels), atol=2e-5, rtol=1e-4
    )


def test_shapes_and_classes_come_from_the_configs(pipelines):
    teacher = load(str(pipelines["edm"]), null_label=10)
    assert teacher.shape == (1, 8, 8)
    assert teacher.codec.classes == 10
    assert load(str(pipelines["unconditional"])).codec.condition(["anything"]) is None


def test_a_null_label_makes_guidance(pipelines):
    teacher = load(str(pipelines["edm"]), null_label=10)
    guided = Guided(teacher.denoiser, 2.0, teacher.codec.null)
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]), teacher.codec.condition([1, 2])
    none = {"class_labels": torch.tensor([10, 10])}
    by_hand = 2 * teacher.denoiser(x, t, cond) - teacher.denoiser(x, t, none)
    torch.testing.assert_close(guided(x, t, cond), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("label", ["ten", "10", "-1"])
def test_labels_that_do_not_exist_are_refused(pipelines, label):
    with refused("labels", "0", "9"):
        load(str(pipelines["edm"]), null_label=10).codec.condition([label])


def test_a_missing_folder_is_named():
    with refused("teacher './nowhere'", "folder"):
        load("./nowhere")


def test_an_unsupported_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    with refused("teacher '*'", "StableVideoDiffusionPipeline"):
        load(str(tmp_path))


def test_a_folder_without_an_index_is_not_a_pipeline(tmp_path):
    with refused("teacher '*'", "model_index.json"):
        load(str(tmp_path))


def test_truncated_weights_are_refused(pipelines, tmp_path):
    shutil.copytree(pipelines["edm"], tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with refused("teacher '*/cut'", " at "):
        load(str(tmp_path / "cut"))


def test_pickled_weights_are_never_loaded(pipelines, tmp_path):
    shutil.copytree(pipelines["edm"], tmp_path / "old")
    weights = tmp_path / "old" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with refused("teacher '*/old'", "pickled"):
        load(str(tmp_path / "old"))


def test_an_unknown_scheduler_is_refused(pipelines, tmp_path):
    shutil.copytree(pipelines["eps"], tmp_path / "odd")
    config = tmp_path / "odd" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("DDIMScheduler", "EDMEulerSchedulre"))
    with refused("teacher '*/odd'", "EDMEulerScheduler"):
        load(str(tmp_path / "odd"))


def test_a_flat_folder_loads_as_diffusers_loads_it(pipelines, tmp_path):
    for part in ("unet", "scheduler", "."):
        for file in (pipelines["unconditional"] / part).glob("*.*"):
            shutil.copy(file, tmp_path)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6])
    nested = load(str(pipelines["unconditional"])).denoiser
    torch.testing.assert_close(load(str(tmp_path)).denoiser(x, t), nested(x, t))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"trained_betas": [0.1, 0.2]},
            ("teacher '*/odd'", "2", "1000", "num_train_timesteps"),
        ),
        (
            {"rescale_betas_zero_snr": True},
            ("teacher '*/odd'", "rescale_betas_zero_snr", "v_prediction"),
        ),
        ({"beta_schedule": "zzz"}, ("teacher '*/odd'", "read")),
        ({"prediction_type": "v_predictoin"}, ("teacher '*/odd'", "v_prediction")),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(pipelines, tmp_path, change, says):
    shutil.copytree(pipelines["eps"], tmp_path / "odd")
    config = tmp_path / "odd" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with refused(*says):
        load(str(tmp_path / "odd"))


def test_a_learned_variance_is_cut_off(tmp_path):
    from students import schedulers
    from students.export.folder import rehearse
    from tests.helpers.toys import SMALL

    unet = diffusers.UNet2DModel(**{**SMALL, "out_channels": 2})
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    teacher = load(str(tmp_path))
    student = schedulers.student(teacher, 2)
    assert student.denoiser.backbone.config.out_channels == 1
    rehearse(student, teacher)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.9])
    torch.testing.assert_close(student.denoiser(x, t), teacher.denoiser(x, t), atol=1e-5, rtol=1e-4)


def test_the_embedded_teacher_denoises_digits():
    from eval.digits import data

    teacher = load("digits")
    images, labels = data()
    x, cond = images[:64], {"class_labels": labels[:64]}
    for level in (0.1, 0.5, 2.0):
        t = teacher.denoiser.process.time(torch.full((64,), level))
        x_t = x + level * torch.randn_like(x)
        after = (teacher.denoiser(x_t, t, cond) - x).square().mean()
        assert after < 0.8 * (x_t - x).square().mean()
