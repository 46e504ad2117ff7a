"""Phased and trajectory consistency: their limits, their edges, and closed forms."""

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.trajectory.lcm import LCM
from distill.objectives.trajectory.pcm import PCM, edges_of
from distill.objectives.trajectory.tcd import TCD
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Tabulated
from tests.helpers.refusals import refused
from tests.helpers.toys import Slopes

D = torch.float64


def levels_of(process, n):
    return torch.tensor(process.levels(n), dtype=D)


DDPM = Tabulated.scaled_linear()
DDIM4 = tuple(i / 999 for i in (999, 749, 499, 249))  # the stock scheduler's


def gaussian(process, c=0.5):
    return Gaussian(torch.zeros(1, dtype=D), torch.tensor([c**2], dtype=D), process)


def make(kind, process, levels, times=(1.0,), renoise=False, **keys):
    network = Slopes(levels_of(process, levels), torch.ones(levels + 1, dtype=D), process)
    student = Generator(network, times, renoise)
    keys = {"target_ema": 0.0, "distance": "square", **keys}
    objective = kind(teacher=gaussian(process), student=student, levels=levels, **keys)
    return objective, network


def drawn(n=512):
    return Batch(0.5 * torch.randn(n, 1, dtype=D), torch.randn(n, 1, dtype=D))


def slope(process, teacher, t, r, one=torch.ones(1, 1, dtype=D)):  # noqa: B008
    return process.step(one, teacher(one, t[None], None), t[None], r[None]).item()


# ---- the edges


def test_the_papers_edges_are_the_times_below_its_grid():
    index = DDPM.index(levels_of(DDPM, 50))[edges_of(50, 4)]
    torch.testing.assert_close(index, torch.tensor([0, 239, 499, 739], dtype=D))


def test_a_cell_belongs_to_the_phase_that_it_starts_in():
    objective, _ = make(PCM, DDPM, 40, DDIM4)
    cells = torch.tensor([0, 9, 10, 19, 20, 39])
    assert objective.edge(cells).tolist() == [0, 0, 10, 10, 20, 30]


def test_phases_that_do_not_end_on_the_students_times_are_refused():
    with refused("objective.levels", "50", "4", "40"):
        make(PCM, DDPM, 50, DDIM4)
    with refused("student.renoise"):
        make(PCM, DDPM, 40, DDIM4, renoise=True)
    with refused("objective.levels", "48"):
        make(LCM, DDPM, 48)


def test_tcds_edges_are_every_level_from_r_down_and_as_likely():
    objective, _ = make(TCD, DDPM, 50)
    torch.manual_seed(0)
    edge = objective.edge(torch.full((30_000,), 9))
    share = torch.bincount(edge, minlength=10) / 30_000
    torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)
    assert objective.edge(torch.zeros(100, dtype=torch.long)).max() == 0


# ---- limits


def test_one_phase_is_latent_consistency():
    """Where t = 0 is data, the step to the edge is x̂ itself."""
    batch, values = drawn(), []
    for kind in (LCM, PCM):
        objective, network = make(kind, Linear(), 20, distance="huber")
        with torch.no_grad():
            network.slopes.copy_(torch.linspace(0.3, 0.9, 21, dtype=D))
        torch.manual_seed(3)
        loss = objective.loss(batch, 0).value
        values.append((loss, *torch.autograd.grad(loss, network.slopes)))
    for lcm, pcm in zip(*values, strict=True):
        torch.testing.assert_close(lcm, pcm)


@pytest.mark.parametrize("process", [DDPM, Karras(), Linear()], ids=["ddpm", "karras", "flow"])
def test_as_many_phases_as_levels_regress_the_teachers_own_step(process):
    levels = 5
    times = tuple(levels_of(process, levels)[1:].flip(0).tolist())
    objective, network = make(PCM, process, levels, times)
    with torch.no_grad():
        network.slopes.mul_(0.7)
    batch = drawn()
    torch.manual_seed(0)
    loss = objective.loss(batch, 0).value
    torch.manual_seed(0)
    cell = torch.randint(levels, (512,))
    t, r = levels_of(process, levels)[cell + 1], levels_of(process, levels)[cell]
    x_t = process.noise(batch.x, t, batch.noise)
    teachers = process.step(x_t, objective.teacher(x_t, t, None), t, r)
    mine = process.step(x_t, network(x_t, t), t, r)
    torch.testing.assert_close(loss, (mine - teachers).square().mean())


def optimum(process, levels, edges):
    """x̂'s slopes at the levels from 0 up: products of the teacher's steps to each phase's edge."""
    times, teacher, one = levels_of(process, levels), gaussian(process), torch.ones(1, 1, dtype=D)
    slopes, landing = [1.0], 1.0
    for k in range(1, levels + 1):
        edge = max(e for e in edges if e < k)
        before = 1.0 if k - 1 == edge else landing
        landing = before * slope(process, teacher, times[k], times[k - 1])
        end = process.end(one, landing * one, times[k][None], times[edge][None])
        slopes.append(end.item())
    return torch.tensor(slopes, dtype=D)


@pytest.mark.parametrize("process", [DDPM, Karras(), Linear()], ids=["ddpm", "karras", "flow"])
def test_at_its_optimum_nothing_is_left_to_learn(process):
    times = DDIM4 if process is DDPM else (1.0, 0.75, 0.5, 0.25)
    objective, network = make(PCM, process, 40, times)
    with torch.no_grad():
        network.slopes.copy_(optimum(process, 40, edges_of(40, 4)))
    loss = objective.loss(drawn(4096), 0)
    assert loss.value.item() < 1e-12
    loss.value.backward()
    assert network.slopes.grad.abs().max() < 1e-6


def test_a_student_at_its_optimum_walks_as_its_teacher_does_in_40_steps():
    process = DDPM
    objective, network = make(PCM, process, 40, DDIM4)
    with torch.no_grad():
        network.slopes.copy_(optimum(process, 40, edges_of(40, 4)))
    x, times = torch.ones(1, 1, dtype=D), levels_of(process, 40)
    expected = 1.0
    for k in range(40, 10, -1):  # as far as the last edge
        expected *= slope(process, objective.teacher, times[k], times[k - 1])
    for k in range(3):
        x = objective.student.step(x, k)
    assert x.item() == pytest.approx(expected, rel=1e-9)


def test_tcd_of_one_step_to_each_level_is_zero_at_the_teacher_where_steps_are_exact():
    """Data of one point: the path is the line, so any edge has the same x̂."""
    process = Karras()
    network = Slopes(levels_of(process, 20), torch.zeros(21, dtype=D), process)
    objective = TCD(
        teacher=gaussian(process, 0.0), student=Generator(network), levels=20, distance="square"
    )
    zero = Batch(torch.zeros(256, 1, dtype=D), torch.randn(256, 1, dtype=D))
    assert objective.loss(zero, 0).value.item() < 1e-20
    with torch.no_grad():
        network.slopes.add_(0.1)
    assert objective.loss(zero, 0).value.item() > 1e-4


# ---- the adversarial loss


class Line(torch.nn.Module):
    """A critic whose logit is x_t times a number that learns."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones((), dtype=D))
        self.seen = []

    def forward(self, x_t, t, cond=None):
        self.seen.append((x_t.detach(), t))
        return self.w * x_t[:, 0]


@pytest.mark.parametrize("process", [DDPM, Linear()], ids=["ddpm", "flow"])
def test_noise_added_above_a_time_keeps_the_marginals(process):
    s, t = torch.full((200_000,), 0.25, dtype=D), torch.full((200_000,), 0.75, dtype=D)
    x = 0.5 * torch.randn(200_000, 1, dtype=D)
    x_s = process.noise(x, s, torch.randn_like(x))
    x_t = process.noisier(x_s, s, t, torch.randn_like(x))
    alpha, sigma = (v[0].item() for v in process.scales(t))
    assert x_t.var().item() == pytest.approx((0.5 * alpha) ** 2 + sigma**2, rel=0.02)
    assert (x * x_t).mean().item() == pytest.approx(0.25 * alpha, rel=0.05)
    torch.testing.assert_close(process.noisier(x_s, s, s, x), x_s)  # no time, no noise


def test_the_critic_sees_landings_and_targets_at_one_time_of_their_phase_with_one_noise():
    objective, network = make(PCM, DDPM, 40, DDIM4)
    objective.critic = critic = Line()
    value = objective.critic_loss(drawn()).value
    (fake, t), (real, same) = critic.seen
    assert torch.equal(t, same)
    expected = (1 + fake).relu().mean() + (1 - real).relu().mean()
    torch.testing.assert_close(value, expected.clone(), check_dtype=False)
    value.backward()
    assert critic.w.grad is not None and network.slopes.grad is None
    levels = levels_of(DDPM, 40)
    index = torch.searchsorted(levels, t)
    torch.testing.assert_close(levels[index], t)
    assert index.min() >= 1 and index.max() == 40
    with torch.no_grad():  # where the student lands right, both are the same
        network.slopes.copy_(optimum(DDPM, 40, edges_of(40, 4)))
    objective.critic = critic = Line()
    objective.critic_loss(drawn())
    torch.testing.assert_close(critic.seen[0][0], critic.seen[1][0], atol=1e-9, rtol=1e-9)


def test_a_landing_is_noised_within_its_phase_alone():
    objective, _ = make(PCM, DDPM, 40, DDIM4)
    cells = torch.tensor([0, 9, 10, 19, 20, 39])
    assert objective.top(cells).tolist() == [10, 10, 20, 20, 30, 40]
    objective.critic = critic = Line()
    batch, levels = drawn(4096), levels_of(DDPM, 40)
    found = objective.landings(batch)
    objective.logits(batch, found, found.fake)
    index = torch.searchsorted(levels, critic.seen[0][1])
    assert (index > found.edge).all() and (index <= found.top).all()
    assert {(i - e).item() for i, e in zip(index, found.edge, strict=True)} == set(range(1, 11))


def test_the_student_climbs_the_critics_logits_and_with_weight_0_does_not():
    objective, network = make(PCM, DDPM, 40, DDIM4)
    batch = drawn()

    def gradient(**keys):
        for key, value in keys.items():
            setattr(objective, key, value)
        network.slopes.grad = None
        torch.manual_seed(3)
        loss = objective.loss(batch, 0)
        loss.value.backward()
        return loss.value.item(), network.slopes.grad.clone()

    plain = gradient()
    none = gradient(critic=Line(), gan_weight=0.0)
    assert plain[0] == none[0] and torch.equal(plain[1], none[1])
    value, with_critic = gradient(gan_weight=1.0)
    found = torch.manual_seed(3) and objective.landings(batch)
    pushed = objective.logits(batch, found, found.fake)[0].mean()
    (up,) = torch.autograd.grad(pushed, network.slopes)
    assert value == pytest.approx(plain[0] - pushed.item(), rel=1e-9)
    torch.testing.assert_close(with_critic, plain[1] - up)
