"""Latent consistency against its published training step, and against closed forms."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.losses import element_huber
from distill.objectives.trajectory.lcm import LCM
from students import schedulers
from students.generator import Generator
from students.lora import unwrap
from students.scale_reading import scale_reading
from teachers import load
from teachers.analytic import Gaussian
from teachers.conditions import GUIDANCE_SCALE
from teachers.denoiser import Guided
from teachers.process import Karras, Linear, Tabulated, expand
from tests.helpers.toys import Slopes

D = torch.float64


def levels_of(process, n):
    return torch.tensor(process.levels(n), dtype=D)


PROCESSES = [Tabulated.scaled_linear(), Karras(), Linear()]


def test_the_elements_huber_is_of_each_element_and_averaged():
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=D)
    found = element_huber(x, torch.zeros_like(x), 0.5)
    expected = [((9.25**0.5 - 0.5) + 0) / 2, ((16.25**0.5 - 0.5) + 0) / 2]
    assert found.tolist() == pytest.approx(expected)


# ---- the grid


def test_ddpms_grid_is_the_papers_indices_and_its_first_step_ends_at_0():
    process = Tabulated.scaled_linear()
    index = process.index(levels_of(process, 50))
    torch.testing.assert_close(index[1:], torch.arange(19, 1000, 20, dtype=D))
    assert index[0] == 0
    with pytest.raises(ValueError, match="1001"):
        levels_of(process, 1001)


@pytest.mark.parametrize("process", PROCESSES[1:], ids=["karras", "flow"])
def test_other_grids_divide_the_path_evenly(process):
    torch.testing.assert_close(
        levels_of(process, 4), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=D)
    )


# ---- the published step


def published(objective, batch, unet, teacher, w_max=0.0):
    """The loss of diffusers' `train_lcm_distill_sd_wds.py`, re-typed for a v-prediction network.

    Its grid, boundary, guidance of both x and ε, DDIM step, embedding of w, and Huber loss.
    """
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    bar = torch.sigmoid(-2 * unwrap(teacher).process.log_ratio).float()
    ddim = torch.arange(1, 51) * 20 - 1
    previous = torch.cat([bar[:1], bar[ddim[:-1]]])
    index = torch.randint(50, (len(batch.noise),))
    start, end = ddim[index], (ddim[index] - 20).clamp(min=0)

    def scalings(timestep, data=0.5):
        scaled = timestep * 10.0
        return data**2 / (scaled**2 + data**2), scaled / (scaled**2 + data**2) ** 0.5

    def wide(v):
        return v.view(-1, 1, 1, 1)

    def both(v, x, t):
        a, s = wide(bar[t].sqrt()), wide((1 - bar[t]).sqrt())
        return a * x - s * v, a * v + s * x

    w = batch.cond[GUIDANCE_SCALE] - 1
    words = {"encoder_hidden_states": batch.cond["text"], "return_dict": False}
    cond = {"timestep_cond": Pipeline.get_guidance_scale_embedding(None, w, 256)}
    noisy = wide(bar[start].sqrt()) * batch.x + wide((1 - bar[start]).sqrt()) * batch.noise
    x_0, _ = both(unet(noisy, start, **words, **cond)[0], noisy, start)
    skip, out = scalings(start)
    prediction = wide(skip) * noisy + wide(out) * x_0
    with torch.no_grad():
        frozen, null = unwrap(teacher).backbone, teacher.null["text"].expand_as(batch.cond["text"])
        x_c, e_c = both(frozen(noisy, start, **words)[0], noisy, start)
        empty = words | {"encoder_hidden_states": null}
        x_u, e_u = both(frozen(noisy, start, **empty)[0], noisy, start)
        guided_x, guided_e = x_c + wide(w) * (x_c - x_u), e_c + wide(w) * (e_c - e_u)
        bar_r = wide(previous[index])
        x_r = bar_r.sqrt() * guided_x + (1 - bar_r).sqrt() * guided_e
        x_0, _ = both(unet(x_r, end, **words, **cond)[0], x_r, end)
        skip, out = scalings(end)
        target = wide(skip) * x_r + wide(out) * x_0
    return (((prediction - target) ** 2 + 1e-3**2).sqrt() - 1e-3).mean()


def test_it_is_diffusers_published_training_step_in_value_and_gradient():
    torch.manual_seed(0)
    teacher = load("shapes")
    student = scale_reading(schedulers.student(teacher, 4), (2.0, 8.0), 4.0)
    unet = unwrap(student.denoiser).backbone
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.02 * torch.randn_like(p))
    guided = Guided(teacher.denoiser, 5.0, teacher.codec.null)
    objective = LCM(teacher=guided, student=student, target_ema=0.0)
    cond = teacher.codec.condition(["a red circle", "two blue squares"] * 3)
    cond = {**cond, GUIDANCE_SCALE: 2 + 6 * torch.rand(6)}
    batch = Batch(torch.randn(6, *teacher.shape), torch.randn(6, *teacher.shape), cond)
    losses, grads = [], []
    for value in (lambda: objective.loss(batch, 0).value,
                  lambda: published(objective, batch, unet, guided)):  # fmt: skip
        torch.manual_seed(1)  # draws one of them the first pair of the grid
        losses.append(value())
        grads.append(torch.autograd.grad(losses[-1], list(unet.parameters()), allow_unused=True))
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5, rel=1e-5)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


# ---- closed forms


def slopes_of(process, levels, path="teacher", distance="square", c=0.5, **keys):
    """LCM on data N(0, c²) with a student of free slopes, and the slopes of its optimum."""
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.tensor([c**2], dtype=D), process)
    times = levels_of(process, levels)
    student = Slopes(times, torch.ones(levels + 1, dtype=D), process)
    objective = LCM(
        teacher=teacher, student=Generator(student), levels=levels, path=path, target_ema=0,
        distance=distance, **keys,
    )  # fmt: skip
    one, slopes = torch.ones(1, 1, dtype=D), [1.0]
    for r, t in zip(times, times[1:], strict=False):
        x = teacher(one, t[None], None)
        slopes.append(slopes[-1] * process.step(one, x, t[None], r[None]).item())
    return objective, student, torch.tensor(slopes, dtype=D)


@pytest.mark.parametrize("process", PROCESSES, ids=["ddpm", "karras", "flow"])
def test_at_its_optimum_nothing_is_left_to_learn(process):
    """The oracle: products of the teacher's DDIM steps."""
    objective, student, slopes = slopes_of(process, 20)
    with torch.no_grad():
        student.slopes.copy_(slopes)
    shape = (2048, 1)
    loss = objective.loss(Batch(0.5 * torch.randn(shape, dtype=D), torch.randn(shape, dtype=D)), 0)
    assert loss.value.item() < 1e-12
    loss.value.backward()
    assert student.slopes.grad.abs().max() < 1e-6


def test_lcfs_loss_at_its_optimum_is_its_floor():
    """Without a teacher the target is noisy: k²c²(σ_t - σ_r)²/(c² + σ_t²), averaged over steps."""
    process, levels = Karras(), 20
    objective, student, slopes = slopes_of(process, levels, path="data")
    with torch.no_grad():
        student.slopes.copy_(slopes)
    torch.manual_seed(0)
    shape = (400_000, 1)
    batch = Batch(0.5 * torch.randn(shape, dtype=D), torch.randn(shape, dtype=D))
    loss = objective.loss(batch, 0).value
    sigma = process.scales(levels_of(process, levels))[1]
    gap, total = sigma.diff(), 0.25 + sigma[1:] ** 2
    floor = (slopes[:-1] ** 2 * 0.25 * gap**2 / total).mean()
    assert loss.item() == pytest.approx(floor.item(), rel=0.02)


def test_the_target_of_an_average_is_another_network():
    objective, student, _ = slopes_of(Karras(), 20)
    assert objective.target is student
    teacher = objective.teacher
    other = LCM(teacher=teacher, student=Generator(student), levels=20)
    assert other.target is not student and other.target_ema == 0.95
    with torch.no_grad():
        student.slopes.mul_(2)
    for _turn in other.turns(0):
        pass
    torch.testing.assert_close(other.target.slopes, 0.95 * torch.ones(21, dtype=D) + 0.1)


def test_the_step_follows_the_mix_of_both_predictions():
    """Guidance of x̂ is guidance of ε̂: a DDIM step is affine in either."""
    process = Tabulated.scaled_linear()
    t, r = levels_of(process, 50)[[30]], levels_of(process, 50)[[29]]
    x_t, x, null = torch.randn(3, 1, 4, dtype=D).unbind()
    mixed = null + 3.0 * (x - null)
    eps, eps_null = process.eps(x_t, x, t), process.eps(x_t, null, t)
    alpha, sigma = process.scales(r)
    expected = expand(alpha, x) * mixed + expand(sigma, x) * (eps_null + 3.0 * (eps - eps_null))
    torch.testing.assert_close(process.step(x_t, mixed, t, r), expected)
