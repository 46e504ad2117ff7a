"""Simple diffusion's noise levels, as a process and as a teacher's shift, and learned variances."""

import json
import math
import shutil

import diffusers
import pytest
import torch

from distill.config.recipe import Recipe
from students import own_network, schedulers
from students.export.folder import rehearse
from students.export.own_folder import rehearse as rehearse_own
from teachers import Cosine, Trig, load
from teachers.denoiser import without_variance
from teachers.process import Linear
from tests.helpers import families
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused
from tests.helpers.toys import SMALL

T = torch.linspace(0, 1, 21, dtype=torch.float64)


def log_snr(process, t=T):
    alpha, sigma = process.scales(t)
    return 2 * (alpha / sigma).log()


# ---- the process


def test_the_cosine_path_is_trigflows_within_its_limits():
    """At ±30 of log SNR, whose angles are those of t = 0 and t = 1 to 10⁻⁶."""
    inner = T[1:-1]
    torch.testing.assert_close(log_snr(Cosine(limit=30.0), inner), log_snr(Trig(), inner),
                               atol=1e-4, rtol=1e-5)  # fmt: skip
    assert log_snr(Cosine())[[0, -1]].tolist() == pytest.approx([15, -15])


@pytest.mark.parametrize(("resolution", "reference"), [(128, 64), (512, 32), (32, 64)])
def test_a_shift_moves_log_snr_by_twice_the_logarithm_of_the_resolutions(resolution, reference):
    """Equation 4 of the paper: + 2 log(reference / resolution)."""
    moved = log_snr(Cosine(resolution / reference)) - log_snr(Cosine())
    torch.testing.assert_close(moved, torch.full_like(T, 2 * math.log(reference / resolution)))
    alpha, sigma = Cosine(resolution / reference).scales(T)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(T))


def test_averaged_pixels_have_the_noise_of_the_reference():
    """Blocks of 4×4 pixels of white noise: σ falls by 4, and log SNR rises by 2 log 4."""
    alpha, sigma = Cosine(4.0).scales(T)
    torch.testing.assert_close(2 * (alpha / (sigma / 4)).log(), log_snr(Cosine()))


def test_interpolated_shifts_are_the_papers():
    """t log SNR(d_low) + (1 - t) log SNR(d_high), of 512 pixels from 32 to 256."""
    low, high = log_snr(Cosine(512 / 32)), log_snr(Cosine(512 / 256))
    torch.testing.assert_close(log_snr(Cosine(512 / 32, 512 / 256)), T * low + (1 - T) * high)


@pytest.mark.parametrize("words", [(0.0,), (1.0, -1.0), (1.0, 1.0, 0.0), (1.0, 30.0)])
def test_shifts_without_a_rising_noise_are_refused(words):
    with pytest.raises(ValueError, match="shift"):
        Cosine(*words)


# ---- a teacher's shift


def ratios(teacher):
    process = teacher.denoiser.process
    alpha, sigma = process.scales(torch.arange(process.last + 1).double() / process.last)
    return sigma / alpha


@pytest.mark.parametrize("shift", [4.0, (2.0, 8.0)])
def test_betas_are_shifted_at_every_index(pipelines, shift):
    """To the digits of diffusers' float32; the network reads the same indices."""
    plain, moved = (load(str(pipelines["eps"]), **words) for words in ({}, {"shift": shift}))
    start, end = shift if isinstance(shift, tuple) else (shift, shift)
    t = torch.linspace(0, 1, len(ratios(plain)), dtype=torch.float64)
    expected = ratios(plain) * start * (end / start) ** t
    torch.testing.assert_close(ratios(moved), expected, rtol=2e-3, atol=0)
    times = torch.tensor([0.2, 0.9])
    torch.testing.assert_close(moved.denoiser.time(times), plain.denoiser.time(times))
    x_t, (alpha, sigma) = torch.randn(2, *plain.shape), moved.denoiser.process.scales(times)
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        eps = moved.denoiser.backbone(x_t, plain.denoiser.time(times), labels).sample[:, :1]
        found = moved.denoiser(x_t, times, {"class_labels": labels})
    expected = (x_t - sigma.view(-1, 1, 1, 1) * eps) / alpha.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_shifted_cosine_scheduler_is_the_process(pipelines, tmp_path):
    """Diffusers' squaredcos_cap_v2 begins at an offset of 0.008; between, both agree."""
    copy = shutil.copytree(pipelines["eps"], tmp_path / "t")
    file = copy / "scheduler" / "scheduler_config.json"
    content = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    file.write_text(json.dumps(json.loads(file.read_text()) | content))
    process, t = load(str(copy), shift=4.0).denoiser.process, T[3:-2]
    torch.testing.assert_close(log_snr(process, t), log_snr(Cosine(4.0), t), atol=0.12, rtol=0)


@pytest.mark.parametrize("name", ["sd", "sd2", "sd3.5", "flux-dev"])
def test_shifted_teachers_leave_stock_students(folders, name):
    """The student's scheduler has the shifted levels; of flows, the shift that was given."""
    options = families.OPTIONS.get(name, {})
    teacher = load(folders(name), shift=5.0, **options)
    if name.startswith("sd") and name != "sd3.5":
        expected = 5 * ratios(load(folders(name), **options))
        torch.testing.assert_close(ratios(teacher), expected, rtol=2e-3, atol=0)
    else:
        assert teacher.denoiser.process == Linear(5.0)
    rehearse(disturbed(schedulers.student(teacher, 2)).eval(), teacher)


def test_shifts_that_cannot_be_are_refused(pipelines, folders):
    with refused("teacher '*'", "shift", "EDM"):
        load(str(pipelines["edm"]), shift=2.0)
    with refused("teacher '*'", "shift", "one"):
        load(folders("sd3"), shift=(1.0, 2.0))
    with refused("teacher '*'", "shift", "1e+09"):
        load(str(pipelines["eps"]), shift=(1e9, 1.0))


def test_a_recipe_gives_one_shift_or_two(pipelines):
    tree = {"objective": {"name": "dmd2"}, "train": {"steps": 2}}
    for shift in (2.0, [2.0, 8.0]):
        teacher = {"source": str(pipelines["eps"]), "shift": shift}
        options = Recipe.check({**tree, "teacher": teacher}).teacher.options()
        assert options["shift"] == (tuple(shift) if isinstance(shift, list) else shift)
    for shift in (0, [1.0], [1.0, 0.0], "four"):
        teacher = {"source": str(pipelines["eps"]), "shift": shift}
        with refused("teacher.shift*"):
            Recipe.check({**tree, "teacher": teacher})


# ---- learned variances


MINE = """
import torch
from teachers import Linear, Network, Pixels, Teacher

class Doubled(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.width = width
        self.layer = torch.nn.Conv1d(width, 2 * width, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x) + t[:, None, None]

def teacher():
    return Teacher(Network(Doubled(), Linear(), "flow"), Pixels(), (3, 4))
"""


def test_a_variance_is_the_second_half_of_twice_as_many_channels():
    x = torch.randn(2, 3, 4)
    output = torch.randn(2, 6, 4)
    assert torch.equal(without_variance(output, x), output[:, :3])
    for shape in [(2, 3, 4), (2, 5, 4), (2, 6, 5), (4, 6, 4), (2, 6)]:
        assert without_variance(torch.zeros(shape), x).shape == shape


def test_networks_of_ones_own_may_learn_a_variance(tmp_path):
    """x̂ does not read it, and the exported sampler does not either."""
    (tmp_path / "mine.py").write_text(MINE)
    teacher = load(f"{tmp_path / 'mine.py'}:teacher")
    backbone = teacher.denoiser.backbone
    x_t, t = torch.randn(2, 3, 4), torch.tensor([0.3, 0.8])
    expected = x_t - t[:, None, None] * backbone(x_t, t)[:, :3]
    torch.testing.assert_close(teacher.denoiser(x_t, t), expected)
    before = teacher.denoiser(x_t, t)
    with torch.no_grad():
        backbone.layer.weight[3:] += 1
    assert torch.equal(teacher.denoiser(x_t, t), before)
    own_network.check(teacher)
    rehearse_own(own_network.student(teacher, 2, None, True, None).eval(), teacher)


@pytest.mark.parametrize("outputs", [3, 4])
def test_a_unet_of_pixels_with_other_outputs_is_refused(tmp_path, outputs):
    """Twice its channels are a mean and a variance; its first channels of three are nothing."""
    unet = diffusers.UNet2DModel(**{**SMALL, "out_channels": outputs})
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    with refused("teacher '*'", "out_channels", outputs):
        load(str(tmp_path))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x_is_what_the_scheduler_of_learned_variances_makes_of_it(tmp_path, prediction):
    """Diffusers' DDPM step takes the same output apart; both halves weigh on its sample."""
    words = {"variance_type": "learned_range", "prediction_type": prediction, "clip_sample": False}
    scheduler = diffusers.DDPMScheduler(**words)
    unet = diffusers.UNet2DModel(**{**SMALL, "out_channels": 2})
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    teacher = load(str(tmp_path))
    x_t = torch.randn(2, 1, 8, 8)
    for index in (100, 600, 999):
        t = torch.full((2,), index / 999)
        with torch.no_grad():
            output = teacher.denoiser.backbone(x_t, index).sample
            found = teacher.denoiser(x_t, t)
        assert output.shape[1] == 2
        step = scheduler.step(output, index, x_t)
        torch.testing.assert_close(found, step.pred_original_sample, atol=2e-4, rtol=1e-3)
